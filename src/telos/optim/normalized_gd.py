"""Normalized gradient descent for logistic regression: steps that do not shrink as examples are classified."""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


class NormalizedGD(torch.optim.Optimizer):
    r"""Normalized LR+GD: full-batch gradient descent on a logistic loss, divided by the mean share of misses.

    For losses ``l_i = -log p_i`` of the examples, with p_i the probability of what is right::

        theta <- theta - lr * beta * grad mean_i l_i,     beta = 1 / mean_i (1 - p_i),     p_i = exp(-l_i)

    From theta = 0 a linear model separates separable data within ``R^2 / mu^2 + 2 log(2 n - 1) / (lr mu^2)`` steps
    (R the largest norm of an example, mu the margin): a bound that hardly knows the number n of examples, and that
    asks for a large rate. Plain gradient descent needs steps in proportion to n in the worst case
    (:func:`telos.theory.logistic_gd` runs both). As lr grows the method becomes the normalized batch perceptron.

    Once all is separated the step length stays near ``lr * R`` although nothing is left to learn, and the iterate may
    lose what it had: so ``step`` leaves the parameters alone then, and ``separated`` says so.

    Mini-batches, networks and more than two classes are extensions of the paper. With any other optimizer, or
    momentum, use :class:`telos.losses.NormalizedLogisticLoss`, whose gradient is the same.

    Args:
        params: parameters, or groups of them with a rate each.
        lr: the rate gamma, above 0; try 1, 10 and 100.
        stop_when_separated: make no step where every p_i is above one half.
        gather_distributed: the batches of all ranks are one; needs ``DistributedDataParallel``, which averages
            gradients, and a loss value on every rank (an empty batch is one).

    Attributes:
        separated: whether every p_i was above one half at the last step, before it.

    Raises:
        ValueError: for a rate that is not above 0; in ``step`` without a closure, or where the closure returns
            something other than the (N,) losses of the examples, with their graph.

    Source:
        From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
        arXiv 2412.08424.

    Example:
        >>> import torch
        >>> from torch.nn.functional import softplus
        >>> signed = torch.tensor([[1.0, -1.0], [1.0, 4.0]])  # each example times its label
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> optimizer = NormalizedGD([theta], lr=50.0)
        >>> while not optimizer.separated:
        ...     mean = optimizer.step(lambda: softplus(-signed @ theta))
        >>> theta.detach()
        tensor([100.,  25.])
    """

    # what a training loop must give it beyond gradients, by the name that losses use for what they need
    needs: ClassVar[frozenset[str]] = frozenset({"closure"})

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 10.0,
        *,
        stop_when_separated: bool = True,
        gather_distributed: bool = False,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        super().__init__(params, {"lr": lr})
        self.stop_when_separated = stop_when_separated
        self.gather_distributed = gather_distributed
        self.separated = False

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Make one step, unless all is separated.

        Args:
            closure: returns the losses (N,) of the examples with their graph, for example cross-entropy with
                ``reduction="none"``; it calls neither ``backward`` nor ``zero_grad``.

        Returns:
            The mean loss before the step, without graph; over this rank's examples.
        """
        if closure is None:
            raise ValueError("step needs a closure that returns the losses (N,) of the examples")
        with torch.enable_grad():
            losses = closure()
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.requires_grad:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"the closure must return the losses (N,) of the examples with their graph, got {got}"
            )
        values = losses.detach()
        # 1 - p without cancellation
        misses = (-torch.expm1(-values.double())).sum()
        # p of one half, to rounding, is a tie; a NaN is no success
        sure = values < math.log(2) * (1 - 8 * torch.finfo(values.dtype).eps)
        uncertain = (~sure).sum().double()
        ranks = 1
        if self.gather_distributed and dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            both = torch.stack([misses, uncertain])
            dist.all_reduce(both)
            misses, uncertain = both.unbind()
        # backward passes are in step over ranks: each makes its own, whatever comes of it
        factor = torch.where(misses > 0, ranks / misses, 0.0)
        self.zero_grad()
        losses.backward(factor.to(values.dtype).expand_as(losses))
        self.separated = not bool(uncertain > 0)
        if not (self.separated and self.stop_when_separated):
            self._descend()
        return values.mean() if len(values) else values.sum()

    @torch.no_grad()
    def _descend(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
