"""Normalised softmax: cross-entropy on scaled cosines, so that every class is a direction on the sphere."""

import math
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from telos.losses._algebra import Loss
from telos.losses._checks import (
    check_embeddings,
    check_floating,
    check_label_values,
    check_range,
    check_shape,
)
from telos.losses._pairs import cosine_logits, normalized_rows, scaled_products
from telos.losses._reduction import Denominator, Reduction, check_reduction, classification_rows, reduce
from telos.losses._space import Space, log_uniform
from telos.losses._task import TaskInfo

UnitNorm: TypeAlias = Literal["reparam", "project"]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def spherical_logits(embeddings: Tensor, weight: Tensor, scale: float | Tensor, mode: str) -> Tensor:
    """``s cos(e, w_c)``; with ``mode="project"`` the rows of ``weight`` are taken as they are."""
    if mode == "project":
        return scaled_products(normalized_rows(embeddings), weight, scale)
    return cosine_logits(embeddings, weight, scale)


@torch.no_grad()
def project_rows_(weight: Tensor) -> Tensor:
    """``w_c <- w_c / (||w_c|| + 1e-7)`` in place, as the authors do after every optimizer step."""
    return weight.div_(weight.norm(dim=-1, keepdim=True) + 1e-7)


@torch.no_grad()
def random_directions_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill with rows of unit length that point anywhere with equal chance."""
    weight.normal_(generator=generator)
    return weight.copy_(F.normalize(weight, dim=-1))


def check_sphere(scale: float | Tensor, mode: str) -> None:
    """Refuse a scale that is not positive, and an unknown way to hold the norm."""
    if not isinstance(scale, Tensor):
        check_range("scale", scale, 0.0, math.inf, open_low=True)
    if mode not in ("reparam", "project"):
        raise ValueError(f"mode must be 'reparam' or 'project', got {mode!r}")


def _rows(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    mode: str,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_embeddings(embeddings, labels)
    check_floating("weight", weight)
    check_shape("weight", weight, ("C", embeddings.shape[1]))
    check_label_values("labels", labels, weight.shape[0], ignore_index)
    counts = labels != ignore_index
    if class_weight is not None:
        check_shape("class_weight", class_weight, (weight.shape[0],))
        counts = counts & (class_weight[torch.where(counts, labels, 0)] != 0)
    if sample_weight is not None:
        check_shape("sample_weight", sample_weight, tuple(labels.shape))
        counts = counts & (sample_weight != 0)
    # before the norm, whose slope would turn a NaN of an ignored row into a NaN gradient
    embeddings = torch.where(counts.unsqueeze(-1), embeddings, torch.zeros_like(embeddings))
    return classification_rows(
        _cross_entropy,
        spherical_logits(embeddings, weight, scale, mode),
        labels,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )


def normalized_softmax_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Integer[Tensor, " batch"],
    weight: Float[Tensor, "classes dim"],
    *,
    scale: float | Tensor = 10.0,
    mode: UnitNorm = "reparam",
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, " batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Normalised softmax: cross-entropy on cosines of embeddings and class directions.

    No bias and no norms, so that a class is nothing but a direction, and the mean direction of a few examples
    can stand in for a class that was never trained (:func:`telos.surgery.add_class`)::

        z_ic = s * <e_i / ||e_i||, w_c / ||w_c||>
        loss = -log softmax(z_i)_{y_i}

    C evenly spread classes cannot bring it below ``log(1 + (C - 1) exp(-s C / (C - 1)))``: 1.37 for C = 10 at
    s = 1, 0.0001 at s = 10. Choose s with C in mind. The gradient with respect to an embedding is orthogonal
    to it and falls with its norm, and likewise for the rows of ``weight``: weight decay on them only raises
    their learning rate.

    Args:
        embeddings: (N, D), of any length; a zero row gives uniform probabilities and no gradient.
        labels: (N,) classes in [0, C).
        weight: (C, D) class weights.
        scale: s, the radius of the sphere (an inverse temperature), above 0; a scalar tensor may be learned.
        mode: ``"reparam"`` divides the rows of ``weight`` by their norm inside the loss. ``"project"`` takes
            them as they are, for a caller that brings them back to unit length after every step, as the
            authors do.
        class_weight: (C,) weight of each class.
        sample_weight: (N,) weight of each example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range, a scale that is not positive or an unknown
            option.
        TypeError: for a wrong dtype.

    Source:
        Hyperspherical embedding for novel class classification, arXiv 2102.03243. The norm inside the loss:
        NormFace: L2 Hypersphere Embedding for Face Verification, arXiv 1704.06369.

    Example:
        >>> import torch
        >>> embeddings, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> normalized_softmax_loss(embeddings, torch.tensor([1]), weight, scale=10.0)  # log(1 + exp(6 - 8))
        tensor(0.1269)
    """
    check_sphere(scale, mode)
    values, weights = _rows(
        embeddings, labels, weight, scale, mode, class_weight, sample_weight, ignore_index
    )
    return reduce(values, weights, reduction, denominator)


class NormalizedSoftmaxLoss(Loss):
    """Normalised softmax that owns its class weights; see :func:`normalized_softmax_loss`.

    Args:
        num_classes: number of classes C.
        dim: width D of the embeddings.
        scale: s; its starting value with ``learn_scale``.
        learn_scale: make s a parameter, held as its logarithm.
        mode: with ``"project"`` call :meth:`project_` after every optimizer step.
        class_weight: (C,) weight of each class.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Attributes:
        weight: (C, D) parameter; hand ``parameters()`` to the optimizer beside the model's.

    Example:
        >>> import torch
        >>> loss = NormalizedSoftmaxLoss(num_classes=4, dim=2)
        >>> loss(torch.zeros(1, 2), torch.tensor([3])).item() == torch.tensor(4.0).log().item()
        True
    """

    family = "metric"
    space: ClassVar[Space] = {"scale": log_uniform(1.0, 100.0)}
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        dim: int,
        scale: float = 10.0,
        learn_scale: bool = False,
        mode: UnitNorm = "reparam",
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_sphere(scale, mode)
        check_reduction(reduction)
        self.num_classes, self.dim = num_classes, dim
        self.mode: UnitNorm = mode
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn_scale else None
        self._scale = float(scale)
        self.register_buffer("class_weight", class_weight)
        self.reset_parameters()

    @classmethod
    def from_task(cls, info: TaskInfo, **hyperparameters: Any) -> Self:
        """One direction for each class of the task, as wide as its embeddings."""
        if info.num_classes is None or info.dim is None:
            raise ValueError(
                "NormalizedSoftmaxLoss needs a task that knows num_classes and dim, "
                f"got num_classes={info.num_classes}, dim={info.dim}"
            )
        return cls(info.num_classes, info.dim, **hyperparameters)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new class directions, of unit length from the first step on."""
        random_directions_(self.weight, generator)

    @property
    def scale(self) -> float | Tensor:
        """The radius s: a number, or a tensor with a graph where it is learned."""
        return self._scale if self.log_scale is None else self.log_scale.exp()

    def project_(self) -> None:
        """Bring the class weights back to unit length; for ``mode="project"``, after every optimizer step."""
        project_rows_(self.weight)

    def rows(
        self, embeddings: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per example."""
        return _rows(
            embeddings,
            labels,
            self.weight,
            self.scale,
            self.mode,
            self.class_weight,
            sample_weight,
            self.ignore_index,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss; see :func:`telos.losses.reduce` for ``denominator``."""
        values, weights = self.rows(embeddings, labels, sample_weight=sample_weight)
        return reduce(values, weights, self.reduction, denominator)
