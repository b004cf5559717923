"""Heads whose classes are points or directions in embedding space."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from telos.losses._pairs import normalized_rows
from telos.losses.metric.normalized_softmax import (
    UnitNorm,
    check_sphere,
    project_rows_,
    random_directions_,
    spherical_logits,
)


class HypersphericalHead(nn.Module):
    r"""A classifier of directions: ``logits_c = s * cos(e, w_c)``, no bias.

    Train it with cross-entropy, or train with :class:`telos.losses.NormalizedSoftmaxLoss` and turn its
    weights into a head. Classes can be added later without training, see :func:`telos.surgery.add_class`.

    Args:
        dim: width D of the embeddings.
        num_classes: number of classes C.
        scale: s, the radius of the sphere, above 0; its starting value with ``learn_scale``. Softmax
            confidence depends on it, the predicted class does not.
        learn_scale: make s a parameter, held as its logarithm.
        mode: how class weights keep unit length: ``"reparam"`` divides by their norm in every forward pass,
            ``"project"`` (the authors') takes them as they are and needs :meth:`project_` after every
            optimizer step.

    Raises:
        ValueError: for a scale that is not positive or an unknown mode.

    Source:
        Hyperspherical embedding for novel class classification, arXiv 2102.03243.

    Example:
        >>> import torch
        >>> head = HypersphericalHead(dim=2, num_classes=3, scale=10.0)
        >>> logits = head(torch.randn(5, 2))
        >>> logits.shape, bool(logits.abs().max() <= 10.0001)
        (torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        scale: float = 10.0,
        learn_scale: bool = False,
        mode: UnitNorm = "reparam",
    ) -> None:
        super().__init__()
        check_sphere(scale, mode)
        self.dim, self.num_classes = dim, num_classes
        self.mode: UnitNorm = mode
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn_scale else None
        self._scale = float(scale)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new class directions, of unit length from the first step on."""
        random_directions_(self.weight, generator)

    @property
    def scale(self) -> float | Tensor:
        """The radius s: a number, or a tensor with a graph where it is learned."""
        return self._scale if self.log_scale is None else self.log_scale.exp()

    def directions(self) -> Float[Tensor, "classes dim"]:
        """The class weights at unit length, in float32 or better."""
        return normalized_rows(self.weight)

    def project_(self) -> None:
        """Bring the class weights back to unit length; for ``mode="project"``, after every optimizer step."""
        project_rows_(self.weight)

    def forward(self, embeddings: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch classes"]:
        """Logits, in [-s, s] for class weights of unit length, in float32 or better.

        A zero embedding gives zeros and gets no gradient.
        """
        if embeddings.ndim < 1 or embeddings.shape[-1] != self.dim:
            raise ValueError(f"embeddings must have shape (..., {self.dim}), got {tuple(embeddings.shape)}")
        return spherical_logits(embeddings, self.weight, self.scale, self.mode)

    def extra_repr(self) -> str:
        """Size and options, for ``print``."""
        learned = ", learn_scale=True" if self.log_scale is not None else ""
        size = f"dim={self.dim}, num_classes={self.num_classes}"
        return f"{size}, scale={self._scale}{learned}, mode={self.mode!r}"
