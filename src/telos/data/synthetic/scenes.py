"""Scenes: objects with attributes, and relations between them of which few are annotated."""

from typing import NamedTuple

import torch
from torch import Tensor

from telos.losses._checks import check_range


class SceneGraph(NamedTuple):
    """One scene: all ordered pairs of its objects; see :class:`SceneGraphWorld`.

    Attributes:
        features: (M, 37) of every pair: subject and object as 18 noisy numbers each, and how salient the pair is.
        target: (M,) predicate of an annotated pair, from 1; 0 is background.
        subject: (M,) class of the subject.
        object: (M,) class of the object.
    """

    features: Tensor
    target: Tensor
    subject: Tensor
    object: Tensor


class SceneGraphWorld:
    """A world of scene graphs in which rare and unseen compositions can be understood from their parts.

    Objects have a class and, through it, one of a few attributes (``class mod attributes``). The predicate of a pair
    is a random table of the two attributes, so that it can be inferred for a pair of classes that training never
    annotated. A graph of n objects has ``n (n - 1)`` ordered pairs, of which the most salient ones are annotated; all
    others are background, whatever their predicate.

    Args:
        classes: number of object classes.
        attributes: number of attributes.
        predicates: number of predicates; labels are 1 to ``predicates``.
        held_out: share of the ordered pairs of classes that training graphs never annotate, in [0, 1).
        noise: standard deviation of the noise on the features of an object, beside class vectors of standard normal
            entries.
        generator: source of the world's own draws.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> import torch
        >>> world = SceneGraphWorld(generator=torch.Generator().manual_seed(0))
        >>> graph = world.draw(12, 6, generator=torch.Generator().manual_seed(1))
        >>> graph.features.shape, int((graph.target > 0).sum())
        (torch.Size([132, 37]), 6)
    """

    class_width, attribute_width = 12, 6

    def __init__(
        self,
        classes: int = 20,
        attributes: int = 4,
        predicates: int = 8,
        *,
        held_out: float = 0.15,
        noise: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, number in (("classes", classes), ("attributes", attributes), ("predicates", predicates)):
            check_range(name, number, 1, float("inf"))
        check_range("noise", noise, 0.0, float("inf"))
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
        self.classes, self.attributes, self.predicates = classes, attributes, predicates
        self.noise = noise
        class_vectors = torch.randn(classes, self.class_width, generator=generator)
        attribute_vectors = torch.randn(attributes, self.attribute_width, generator=generator)
        attribute = torch.arange(classes) % attributes
        table = torch.randint(1, predicates + 1, (attributes, attributes), generator=generator)
        chosen = torch.randperm(classes * classes, generator=generator)[: round(held_out * classes * classes)]
        self.vectors = torch.cat([class_vectors, attribute_vectors[attribute]], 1)
        self.predicate = table[attribute][:, attribute]
        """(classes, classes): the predicate of every ordered pair of classes."""
        self.held_out = torch.zeros(classes * classes, dtype=torch.bool)
        self.held_out[chosen] = True
        self.held_out = self.held_out.reshape(classes, classes)
        """(classes, classes): pairs of classes that training graphs never annotate."""

    def draw(
        self,
        nodes: int,
        edges: int,
        *,
        zipf: bool = False,
        training: bool = True,
        generator: torch.Generator | None = None,
    ) -> SceneGraph:
        """One graph.

        Args:
            nodes: objects, at least 2.
            edges: annotated pairs; fewer where the graph has no more pairs that may be annotated.
            zipf: draw classes with probabilities in proportion to 1, 1/2, 1/3, ...; uniformly otherwise.
            training: never annotate the held-out pairs of classes.
            generator: source of the draws.

        Returns:
            Features, labels and classes of all ordered pairs.

        Raises:
            ValueError: for fewer than two nodes or no edge.
        """
        check_range("nodes", nodes, 2, float("inf"))
        check_range("edges", edges, 1, float("inf"))
        rank = torch.arange(1, self.classes + 1, dtype=torch.float)
        probabilities = 1 / rank if zipf else torch.ones_like(rank)
        label = torch.multinomial(probabilities, nodes, replacement=True, generator=generator)
        noise = torch.randn(nodes, self.vectors.shape[1], generator=generator)
        seen = self.vectors[label] + self.noise * noise
        first, second = (~torch.eye(nodes, dtype=torch.bool)).nonzero().unbind(1)
        salience = torch.rand(len(first), generator=generator)
        order = salience + 0.15 * torch.randn(len(first), generator=generator)
        subject, object_ = label[first], label[second]
        if training:
            order = order.masked_fill(self.held_out[subject, object_], torch.inf)
        annotated = order.argsort()[:edges]
        annotated = annotated[order[annotated].isfinite()]
        target = torch.zeros(len(first), dtype=torch.long)
        target[annotated] = self.predicate[subject, object_][annotated]
        features = torch.cat([seen[first], seen[second], salience.unsqueeze(1)], 1)
        return SceneGraph(features, target, subject, object_)
