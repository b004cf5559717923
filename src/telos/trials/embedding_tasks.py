"""Embeddings as tasks: trained on labels or on two views of each example, measured by neighbours and probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.losses._algebra import call_keywords
from telos.losses._pairs import normalized_rows
from telos.trials import models
from telos.trials._words import UsageError
from telos.trials.tasks import Batch, ClassificationTask, Fold, _network, _outputs, derive_seed

METRICS = ("map_at_r", "recall_at_1", "probe_accuracy", "naive_bayes_accuracy")
PROBE_TOLERANCE = 1e-3
"""Largest entry of the gradient at which the logistic probe stops: it is fitted after every epoch."""

SHIFT, ROTATION, CUT, NOISE = 0.5, 10.0, 2, 0.2
"""Of a view: pixels of shift, degrees of rotation, side of the square that is cut out, deviation of the noise.

Small, for digits of 8 x 8 pixels are centred and upright: half a pixel is a sixteenth of the image.
"""


@dataclass(frozen=True)
class EmbeddingInfo(models.DataInfo):
    """The facts of a task on embeddings, whose model gives ``dim`` numbers for an example."""

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for an example."""
        assert self.dim is not None
        return self.dim


@dataclass(eq=False)
class EmbeddingTask(ClassificationTask):
    """Metric learning: ``loss(embeddings (N, dim), labels (N,))``, measured by :func:`embedding_metrics`.

    Splits and features are those of a :class:`ClassificationTask`. Batches are plain random ones: 128 rows of ten
    classes hold about thirteen of each, so that every example has positives, and every recipe sees the same batches.
    Embeddings come as the network makes them, since losses that want unit length divide by the length themselves.

    The gallery of the metrics, which the probes are fitted on, is the training split; validation and test splits hold
    it as ``train_inputs`` and ``train_target`` beside their own rows, the queries. With ``novel`` classes the question
    is that of unseen classes: for each seed other ones are drawn and left out of training, and gallery and queries
    are the rows of these alone.

    Tuning looks at MAP@R, which still tells embeddings apart where the nearest neighbour is nearly always right.

    Args:
        name: a short name.
        load: returns inputs (N, D) and labels (N,) in [0, C).
        noise: as in :class:`ClassificationTask`.
        imbalance: as in :class:`ClassificationTask`.
        width: hidden units.
        epochs: how long to train.
        batch_size: examples a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.
        architecture: ``"linear"`` or ``module:factory`` in place of the network.
        dim: width of the embeddings.
        novel: classes to leave out of training and to measure; 0 trains and measures on all.

    Raises:
        telos.trials.UsageError: for fewer than two novel classes; by ``fold``, for more than leave two to train on.

    Source:
        MAP@R: A Metric Learning Reality Check, arXiv 2003.08505.

    Example:
        >>> from telos.trials import load_task
        >>> fold = load_task("digits_embeddings novel=3").fold(seed=0)
        >>> fold.info.num_classes, fold.info.dim, int(fold.train["target"].max()), int(fold.test["target"].max())
        (7, 32, 6, 2)
    """

    family: ClassVar[str] = "metric"
    words: ClassVar[Mapping[str, type]] = {"novel": int}
    best = dict.fromkeys(METRICS, 1.0)
    bands: ClassVar[Mapping[str, float]] = dict.fromkeys(METRICS, 0.01)

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 2e-3
    metric: str = "map_at_r"
    metrics: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(METRICS, "max"))
    dim: int = 32
    novel: int = 0

    def __post_init__(self) -> None:
        if self.novel < 0 or self.novel == 1:
            raise UsageError(f"novel must be 0, or at least 2 classes to tell apart, got {self.novel}")

    @property
    def description(self) -> str:
        """The task in a few sentences, for reports."""
        return f"{super().description} It gives an embedding of {self.dim} numbers, trained on labels. {self._measured}"

    @property
    def _measured(self) -> str:
        if not self.novel:
            return (
                "Each query is held against the training split: by its nearest neighbours and by two probes."
            )
        return (
            f"{self.novel} classes, other ones for each seed, are left out of training; queries and the rows that "
            "they are held against (by nearest neighbours and by two probes) are of these alone."
        )

    def fold(self, seed: int) -> Fold:
        """The split of a seed; the same seed gives the same split, whatever the recipe."""
        fold = super().fold(seed)
        train, gallery, validation, test = fold.train, fold.train, fold.validation, fold.test
        classes = fold.info.num_classes
        assert classes is not None
        if self.novel:
            if self.novel > classes - 2:
                raise UsageError(
                    f"novel must be at most {classes - 2}, so that there are two classes to train on, "
                    f"got {self.novel}"
                )
            generator = torch.Generator().manual_seed(derive_seed(self.name, seed, "novel"))
            place = torch.randperm(classes, generator=generator)
            train = _of_classes(fold.train, place, self.novel, classes)
            gallery, validation, test = (
                _of_classes(split, place, 0, self.novel) for split in (gallery, validation, test)
            )
        held = {"train_inputs": gallery["inputs"], "train_target": gallery["target"]}
        info = self._facts(train, classes - self.novel)
        return Fold(train, {**validation, **held}, {**test, **held}, info)

    def _facts(self, train: Batch, classes: int) -> EmbeddingInfo:
        """What a loss may know: here also of the labels."""
        return EmbeddingInfo(
            family=self.family,
            num_classes=classes,
            num_examples=len(train["target"]),
            dim=self.dim,
            class_counts=tuple(train["target"].bincount(minlength=classes).tolist()),
            supplies=frozenset({"index"}),
            input_shape=tuple(train["inputs"].shape[1:]),
        )

    def model(self, info: TaskInfo) -> nn.Module:
        """A multilayer perceptron with one hidden layer, or what ``architecture`` names."""
        assert isinstance(info, models.DataInfo)
        if self.architecture:
            return models.build(self.architecture, info, self.width)
        return models.mlp(info.input_shape[0], info.outputs, self.width)

    def encoder(self, model: nn.Module) -> nn.Module:
        """The part of a model whose outputs are measured."""
        return model

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """Neighbours and probes of a split's embeddings, with the training split as gallery."""
        encoder = self.encoder(model)
        gallery, queries = (_outputs(encoder, split[name]) for name in ("train_inputs", "inputs"))
        return embedding_metrics(gallery, split["train_target"], queries, split["target"])


@dataclass(eq=False)
class ViewsTask(EmbeddingTask):
    """Contrastive learning without labels: ``loss(z1 (N, dim), z2 (N, dim), index)`` of two views of each image.

    Both are :func:`random_views`, drawn for every step from a generator of their own, so that all recipes see the
    same views of a seed. An encoder with two hidden layers and batch normalisation is trained through a projection
    head; measured is the encoder, by :func:`embedding_metrics` with the training split as gallery. Labels are not
    used before that: neither the loss nor what it may know of the task holds any. Tuning looks at the accuracy of
    the logistic probe, fitted on the training split and scored on the validation split.

    Args:
        name: a short name.
        load: returns square images (N, D) with pixels in [0, top], and labels (N,) in [0, C).
        noise: as in :class:`ClassificationTask`; here it reaches the probes alone.
        imbalance: as in :class:`ClassificationTask`.
        width: hidden units.
        epochs: how long to train.
        batch_size: examples a step, at least 2; all others of a step are the negatives of one.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.
        architecture: ``"linear"`` or ``module:factory`` in place of the encoder.
        dim: width of the encoder's features and of the projections.
        novel: classes to leave out of training and to measure; 0 trains and measures on all.
        top: the largest pixel; pixels are divided by it.

    Raises:
        telos.trials.UsageError: for fewer than two novel classes or a batch of one; by ``fold``, for images that are
            not square or more novel classes than leave two to train on.

    Source:
        A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709.

    Example:
        >>> from telos.trials import load_task
        >>> fold = load_task("digits_views").fold(seed=0)
        >>> fold.info.family, fold.info.num_classes, fold.info.num_examples, float(fold.train["inputs"].max())
        ('contrastive', None, 1078, 1.0)
    """

    family: ClassVar[str] = "contrastive"
    model_words: ClassVar[tuple[str, ...]] = ("model", "width", "batch_size")

    learning_rate: float = 4e-3
    metric: str = "probe_accuracy"
    dim: int = 64
    top: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise UsageError(
                f"batch_size must be at least 2, for a batch of one has no negatives, got {self.batch_size}"
            )

    @property
    def description(self) -> str:
        """The task in a few sentences, for reports."""
        inputs, target = self.load()
        network = _network(self.architecture, self.width) if self.architecture else "two hidden layers"
        return (
            f"{len(target):,} images of {inputs.shape[1]} pixels, learnt without labels from two random views of each "
            f"(shift, rotation, a square cut out, noise); the encoder, {network}, gives {self.dim} features and is "
            f"trained through a projection head. {self._measured}"
        )

    def features(self, inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
        """Pixels in [0, 1]."""
        if math.isqrt(inputs.shape[1]) ** 2 != inputs.shape[1]:
            raise UsageError(f"images must be square to be turned, got {inputs.shape[1]} pixels")
        return inputs / self.top

    def _facts(self, train: Batch, classes: int) -> EmbeddingInfo:
        """What a loss may know: nothing of the labels."""
        return EmbeddingInfo(
            family=self.family,
            num_examples=len(train["target"]),
            dim=self.dim,
            supplies=frozenset({"index"}),
            input_shape=tuple(train["inputs"].shape[1:]),
        )

    def model(self, info: TaskInfo) -> nn.Module:
        """An encoder, two hidden layers or what ``architecture`` names, and a projection head."""
        assert isinstance(info, models.DataInfo)
        if self.architecture:
            encoder = models.build(self.architecture, info, self.width)
        else:
            encoder = nn.Sequential(
                *_block(info.input_shape[0], self.width),
                *_block(self.width, self.width),
                nn.Linear(self.width, info.outputs),
            )
        return Projected(
            encoder, nn.Sequential(*_block(info.outputs, self.dim), nn.Linear(self.dim, self.dim))
        )

    def encoder(self, model: nn.Module) -> nn.Module:
        """The model without its projection head."""
        assert isinstance(model, Projected)
        return model.encoder

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """The loss of two views of a batch; ``index`` goes to losses whose call names it.

        The generator of the views is seeded by torch's global seed, which the runner sets, without drawing from it.
        """
        supplied = (call_keywords(loss) or frozenset()) & {"index"}
        generator = torch.Generator().manual_seed(derive_seed(self.name, torch.initial_seed(), "views"))

        def step(batch: Batch) -> Mapping[str, Tensor]:
            inputs = batch["inputs"]
            z1, z2 = model(random_views(torch.cat([inputs, inputs]), generator)).chunk(2)
            if len(inputs) < 2:  # the last batch of an epoch may be one example, which has no negatives
                return {"loss": 0 * (z1 + z2).sum()}
            return {"loss": loss(z1, z2, **{name: batch[name] for name in supplied})}

        return step


class Projected(nn.Module):
    """An encoder behind a projection head, which only training looks through.

    Example:
        >>> model = Projected(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> model(torch.zeros(5, 4)).shape, model.encoder(torch.zeros(5, 4)).shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, inputs: Tensor) -> Tensor:
        """Projections of a batch."""
        projections: Tensor = self.projector(self.encoder(inputs))
        return projections


def _block(features: int, width: int) -> list[nn.Module]:
    return [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]


def _of_classes(split: Batch, place: Tensor, low: int, high: int) -> Batch:
    """The rows whose class has a place from ``low`` to ``high``, which becomes its label from 0."""
    label = place[split["target"]]
    rows = (low <= label) & (label < high)
    kept = {name: values[rows] for name, values in split.items()}
    return {**kept, "target": label[rows] - low, "index": torch.arange(int(rows.sum()))}


def random_views(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of each image: turned, shifted, with a square cut out and noise added.

    Rotation by up to 10 degrees and a shift of up to half a pixel along each axis, either way (both bilinear, with 0
    from outside), a square of 2 x 2 pixels set to 0, and Gaussian noise with a deviation of 0.2.

    Args:
        inputs: (N, D) square images, row by row, with pixels in [0, 1].
        generator: decides the views.

    Returns:
        (N, D) views; the noise may leave [0, 1].

    Example:
        >>> images = torch.rand(5, 64)
        >>> random_views(images, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 64])
    """
    count, side = len(inputs), math.isqrt(inputs.shape[1])

    def between(size: float) -> Tensor:
        return size * (2 * torch.rand(count, generator=generator) - 1)

    angle, right, down = between(math.radians(ROTATION)), between(2 * SHIFT / side), between(2 * SHIFT / side)
    cos, sin = angle.cos(), angle.sin()
    motion = torch.stack([cos, -sin, right, sin, cos, down], -1).view(count, 2, 3)
    grid = F.affine_grid(motion, [count, 1, side, side], align_corners=False)
    moved = F.grid_sample(inputs.view(count, 1, side, side), grid, align_corners=False)
    corner = torch.randint(side - CUT + 1, (2, count, 1), generator=generator)
    covered = (torch.arange(side) >= corner) & (torch.arange(side) < corner + CUT)
    cut = covered[0].unsqueeze(2) & covered[1].unsqueeze(1)
    noise = NOISE * torch.randn(count, side * side, generator=generator)
    return moved.squeeze(1).masked_fill(cut, 0.0).flatten(1) + noise


def embedding_metrics(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, labels: Tensor
) -> dict[str, float]:
    """What neighbours and probes in a labelled gallery say of the labels of queries.

    All rows are brought to unit length first: only their direction counts. With the gallery in the order of its cosine
    to a query, ``R`` rows of the query's label in it, and ``P(i)`` the share of that label among the first i::

        MAP@R = mean over queries of  1 / R * sum_{i = 1 .. R} P(i) [row i has the query's label]

    Args:
        gallery: (M, D) embeddings that queries are held against.
        gallery_labels: (M,) their labels, at least two different ones.
        queries: (N, D) embeddings.
        labels: (N,) their labels.

    Returns:
        ``map_at_r``; ``recall_at_1``, the share of queries whose nearest row has their label; ``probe_accuracy`` of
        logistic regression fitted to the gallery (features at deviation 1, C = 1); ``naive_bayes_accuracy`` of
        :class:`telos.nn.NaiveBayesHead` fitted to it. NaN, all of them, where an embedding is not finite.

    Source:
        A Metric Learning Reality Check, arXiv 2003.08505 (MAP@R); Revisiting Discriminative vs. Generative
        Classifiers: Theory and Implications, arXiv 2302.02334 (the probes).

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
        >>> found = embedding_metrics(rows, torch.tensor([0, 0, 1, 1]), rows[[0, 2]], torch.tensor([0, 0]))
        >>> found["recall_at_1"], found["map_at_r"], found["probe_accuracy"]
        (0.5, 0.5, 0.5)
    """
    from telos.nn.naive_bayes import NaiveBayesHead, fit_logistic

    if not (gallery.isfinite().all() and queries.isfinite().all()):
        return dict.fromkeys(METRICS, math.nan)
    gallery, queries = normalized_rows(gallery.double()), normalized_rows(queries.double())
    classes = int(gallery_labels.max()) + 1
    counts = gallery_labels.bincount(minlength=max(classes, int(labels.max()) + 1))
    place = torch.arange(1, int(counts.max()) + 1)
    nearest = (queries @ gallery.T).topk(len(place)).indices
    right = gallery_labels[nearest] == labels.unsqueeze(1)
    relevant = counts[labels].unsqueeze(1)
    precision = right.cumsum(1) / place
    average = (precision * right * (place <= relevant)).sum(1) / relevant.clamp_min(1).squeeze(1)

    deviation = gallery.std(0)
    scale = torch.where(deviation > 1e-9, deviation, 1.0)
    features, asked = (gallery - gallery.mean(0)) / scale, (queries - gallery.mean(0)) / scale
    logistic = fit_logistic(features, gallery_labels, classes, tol=PROBE_TOLERANCE)
    # the floor under variances keeps a feature that is constant within every class from deciding alone
    head = NaiveBayesHead(features.shape[1], classes, var_smoothing=1e-6).fit(features, gallery_labels)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == labels).double().mean())

    return {
        "map_at_r": float(average.mean()),
        "recall_at_1": float(right[:, 0].double().mean()),
        "probe_accuracy": accuracy(asked @ logistic.weight.T + logistic.bias),
        "naive_bayes_accuracy": accuracy(head(asked)),
    }
