"""Schedules: functions of the number of steps done."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SmoothedEpsSchedule:
    r"""The radius of certified training: 0, then a power of the step, then a line up to ``eps_max``.

    In batches, with B per epoch, ``s0 = (start - 1) B``, ``s1 = (start + length - 1) B`` and
    ``sm = s0 + int(mid (s1 - s0))``::

        a        = eps_max / ((s1 - sm) beta T + (sm - s0) T),   T = (sm - s0)^(beta - 1)
        eps(s)   = 0                                             s <= s0
                   a (s - s0)^beta                               s0 < s < sm
                   e_m + (eps_max - e_m) (s - sm) / (s1 - sm)    sm <= s,  at most eps_max;  e_m = a (sm - s0)^beta

    The line goes on with the slope of the power.

    Args:
        eps_max: radius at the end, above 0.
        batches_per_epoch: B, at least 1.
        start: epoch, counted from 1, at whose beginning the radius begins to grow.
        length: epochs until it is ``eps_max``, at least 1. The paper's 2 and 80 are for CIFAR-10, 1 and 20 for MNIST
            at eps 0.4, 2 and 20 for TinyImageNet.
        mid: share of the growth that follows the power, in [0, 1].
        beta: the power, at least 2.

    Raises:
        ValueError: for a parameter out of range.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268, with the schedule of auto_LiRPA, which
        is that of arXiv 1906.06316. There ``mid = 0`` and ``mid = 1`` divide by 0; here they are a line and a power.

    Example:
        >>> schedule = SmoothedEpsSchedule(0.4, batches_per_epoch=5, start=2, length=4)
        >>> [round(schedule(step), 4) for step in (0, 5, 10, 15, 25, 100)]
        [0.0, 0.0, 0.0308, 0.1538, 0.4, 0.4]
    """

    eps_max: float
    batches_per_epoch: int
    start: int = 2
    length: int = 80
    mid: float = 0.25
    beta: float = 4.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("batches_per_epoch", 1, float("inf")),
            ("start", 1, float("inf")),
            ("length", 1, float("inf")),
            ("mid", 0.0, 1.0),
            ("beta", 2.0, float("inf")),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
        if not self.eps_max > 0:
            raise ValueError(f"eps_max must be above 0, got {self.eps_max}")

    def __call__(self, step: int) -> float:
        """The radius of the batch before which ``step`` batches were done."""
        first = (self.start - 1) * self.batches_per_epoch
        last = first + self.length * self.batches_per_epoch
        middle = first + int((last - first) * self.mid)
        if step <= first:
            return 0.0
        if step >= last:
            return self.eps_max
        # the power reaches the share (sm - s0) / (sm - s0 + beta (s1 - sm)) of eps_max
        curved, straight = middle - first, last - middle
        reached = self.eps_max * curved / (curved + self.beta * straight)
        if step < middle:
            return reached * ((step - first) / curved) ** self.beta
        return min(reached + (self.eps_max - reached) * (step - middle) / straight, self.eps_max)
