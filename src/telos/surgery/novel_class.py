"""New classes for a trained classifier of directions, from a few examples and without training."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from telos.losses import NormalizedSoftmaxLoss
from telos.losses._checks import check_embeddings, check_floating, check_shape
from telos.losses._pairs import normalized_rows
from telos.nn.prototypes import HypersphericalHead


def class_prototype(embeddings: Float[Tensor, "shots dim"], *, strict: bool = True) -> Float[Tensor, " dim"]:
    r"""The mean direction of a class's embeddings.

    Each embedding counts by its direction only, so that a long one does not outvote the others::

        p = mean_k e_k / ||e_k||,   prototype = p / ||p||

    Args:
        embeddings: (K, D) of K >= 1 examples of one class.
        strict: refuse embeddings whose directions cancel; otherwise their prototype is zero, and so are its
            logits.

    Returns:
        (D,) of unit length, in float32 or better, without a graph.

    Raises:
        ValueError: for a wrong shape, no example, or directions that cancel.
        TypeError: for a wrong dtype.

    Source:
        Hyperspherical embedding for novel class classification, arXiv 2102.03243.

    Example:
        >>> import torch
        >>> class_prototype(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))
        tensor([0.7071, 0.7071])
    """
    check_floating("embeddings", embeddings)
    check_shape("embeddings", embeddings, ("K", "D"))
    one_class = torch.zeros(embeddings.shape[0], dtype=torch.long, device=embeddings.device)
    return _prototypes(embeddings, one_class, strict)[0]


def add_class(
    head: HypersphericalHead | NormalizedSoftmaxLoss,
    support_embeddings: Float[Tensor, "shots dim"],
    support_labels: Integer[Tensor, " shots"] | None = None,
    *,
    strict: bool = True,
) -> HypersphericalHead:
    r"""A head that knows the old classes and the new ones.

    The prototype of each new class (:func:`class_prototype`) becomes a row after the last one. Known rows are
    copied as they are, so their logits do not change. They were optimised and the new rows are only means:
    expect the known classes to be favoured. Known and novel classes together are the paper's joint scenario.

    The new head has a **new parameter**: an optimizer of the old head neither sees it nor has its state, so
    build a new one (or replace its parameter group) before training goes on. With several processes, call it
    with the same support examples on every rank.

    Args:
        head: a trained head, or the loss that owns the class weights; it is left as it is.
        support_embeddings: (K, D) embeddings of examples of the new classes.
        support_labels: (K,) which new class each example belongs to, any integers; the new rows stand in the
            order of the sorted labels. Not given: one new class.
        strict: refuse a class whose directions cancel; otherwise its row is zero, and so are its logits.

    Returns:
        A new head of the same scale and mode, on the same device and of the same dtype as ``head``.

    Raises:
        ValueError: for a wrong shape, no example, or directions that cancel.
        TypeError: for a wrong dtype.

    Source:
        Hyperspherical embedding for novel class classification, arXiv 2102.03243.

    Example:
        >>> import torch
        >>> from telos.nn import HypersphericalHead
        >>> head = HypersphericalHead(dim=2, num_classes=3)
        >>> grown = add_class(head, torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([11, 10]))
        >>> grown.weight[3:].tolist()
        [[1.0, 0.0], [0.6000000238418579, 0.800000011920929]]
    """
    novel = _novel_rows(head, support_embeddings, support_labels, strict)
    return _head_like(head, torch.cat([head.weight.detach(), novel]))


def replace_classes(
    head: HypersphericalHead | NormalizedSoftmaxLoss,
    support_embeddings: Float[Tensor, "shots dim"],
    support_labels: Integer[Tensor, " shots"] | None = None,
    *,
    strict: bool = True,
) -> HypersphericalHead:
    """A head of the new classes alone: the paper's disjoint scenario, transfer to another label set.

    Args:
        head: a trained head or loss, whose scale, mode, device and dtype are taken over; it is left as it is.
        support_embeddings: (K, D) embeddings of examples of the new classes.
        support_labels: (K,) which new class each example belongs to; rows stand in the order of the sorted
            labels.
        strict: refuse a class whose directions cancel; otherwise its row is zero, and so are its logits.

    Returns:
        A new head, with a new parameter.

    Raises:
        ValueError: for a wrong shape, no example, or directions that cancel.
        TypeError: for a wrong dtype.

    Source:
        Hyperspherical embedding for novel class classification, arXiv 2102.03243.

    Example:
        >>> import torch
        >>> from telos.nn import HypersphericalHead
        >>> replace_classes(HypersphericalHead(2, 8), torch.eye(2), torch.tensor([0, 1])).weight.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _head_like(head, _novel_rows(head, support_embeddings, support_labels, strict))


@torch.no_grad()
def _prototypes(embeddings: Tensor, position: Tensor, strict: bool) -> Tensor:
    """Unit mean directions of the classes 0, 1, ... that ``position`` holds."""
    if not embeddings.shape[0]:
        raise ValueError("support embeddings must hold at least one example, got none")
    directions = normalized_rows(embeddings)
    classes = int(position.max()) + 1
    total = directions.new_zeros(classes, directions.shape[1]).index_add(0, position, directions)
    shots = torch.bincount(position, minlength=classes)
    # what rounding leaves of directions that cancel
    lost = total.norm(dim=1) <= 8 * torch.finfo(total.dtype).eps * shots
    if strict and lost.any():
        raise ValueError(
            f"support embeddings of new class {int(lost.nonzero()[0])} must have a mean direction, "
            "got directions that cancel; add examples, or pass strict=False for a class of zero logits"
        )
    return torch.where(lost.unsqueeze(1), torch.zeros_like(total), normalized_rows(total))


def _novel_rows(
    head: HypersphericalHead | NormalizedSoftmaxLoss, embeddings: Tensor, labels: Tensor | None, strict: bool
) -> Tensor:
    if labels is None:
        labels = torch.zeros(embeddings.shape[0], dtype=torch.long, device=embeddings.device)
    check_embeddings(embeddings, labels)
    check_shape("support_embeddings", embeddings, ("K", head.weight.shape[1]))
    position = torch.unique(labels, return_inverse=True)[1]
    return _prototypes(embeddings, position, strict).to(head.weight)


def _head_like(head: HypersphericalHead | NormalizedSoftmaxLoss, weight: Tensor) -> HypersphericalHead:
    learned = head.log_scale is not None
    scale = float(torch.as_tensor(head.scale).detach())
    new = HypersphericalHead(weight.shape[1], weight.shape[0], scale, learned, head.mode)
    new.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
    if head.log_scale is not None:
        new.log_scale = nn.Parameter(
            head.log_scale.detach().clone(), requires_grad=head.log_scale.requires_grad
        )
    return new.train(head.training)
