"""Workloads, training algorithms, and the protocol that times one on the other.

A workload is data, a model, a loss, a metric and the value of it that has to be reached. A training algorithm
is everything else: optimizer, schedule, batch size, choice of examples, averaging of weights, and the ranges
in which its hyper-parameters are searched. It may not change the model or the loss, nor ask which workload it
is on. What counts is the time to the target, tuning included; :mod:`telos.trials.scoring` makes scores of it.

Time is counted in optimizer steps unless a clock is given.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from telos.fit import Diverged
from telos.losses._space import Range
from telos.trials.recipes import Hyperparameters
from telos.trials.scoring import Floats, Mode
from telos.trials.tasks import Batch, Batches, derive_seed

if TYPE_CHECKING:
    import polars as pl

Clock: TypeAlias = Callable[[], float]
LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True)
class SearchSpace:
    """Ranges of hyper-parameters, sampled quasi-randomly; the same on every workload.

    Args:
        ranges: see :mod:`telos.losses` for the ranges.

    Example:
        >>> from telos.losses import log_uniform
        >>> space = SearchSpace({"learning_rate": log_uniform(1e-3, 1.0)})
        >>> points = space.sample(3, seed=0)
        >>> all(1e-3 <= point["learning_rate"] < 1.0 for point in points)
        True
        >>> points == space.sample(5, seed=0)[:3]
        True
    """

    ranges: Mapping[str, Range]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("ranges must hold at least one range; an algorithm without any has space=None")

    def sample(self, count: int, seed: int) -> list[Hyperparameters]:
        """The first ``count`` points of a scrambled Halton sequence; more keep the earlier ones."""
        from scipy.stats import qmc

        _check_positive("count", count)
        points = qmc.Halton(len(self.ranges), scramble=True, rng=seed).random(count)
        return [
            {name: span.at(float(u)) for (name, span), u in zip(self.ranges.items(), point, strict=True)}
            for point in points
        ]


@dataclass(frozen=True)
class FixedPoints:
    """A list of configurations, drawn without replacement.

    Args:
        points: the configurations.

    Example:
        >>> points = FixedPoints(({"learning_rate": 0.1}, {"learning_rate": 0.01}))
        >>> sorted(point["learning_rate"] for point in points.sample(2, seed=0))
        [0.01, 0.1]
    """

    points: tuple[Hyperparameters, ...]

    def sample(self, count: int, seed: int) -> list[Hyperparameters]:
        """``count`` different points."""
        _check_positive("count", count)
        if count > len(self.points):
            raise ValueError(f"count must be at most the {len(self.points)} points there are, got {count}")
        chosen = np.random.default_rng(seed).permutation(len(self.points))[:count]
        return [dict(self.points[place]) for place in chosen]


@dataclass(frozen=True, eq=False)
class Workload:
    """Data, a model, a loss, and the value of a metric that has to be reached.

    Attributes:
        name: with a seed it decides initialisation and batch order.
        model: makes a fresh model; draws from torch's global generator, which :func:`run_trial` seeds.
        loss: of (outputs, target), to be minimised.
        metric: of (outputs, target) over a whole split, to be measured.
        mode: ``"min"`` where the metric is an error, ``"max"`` where it is a score.
        train: ``inputs`` and ``target`` (N, ...), like the other splits.
        validation: the target is a value of the metric here.
        test: measured beside it and decides nothing.
        target: what has to be reached; ``None`` until it is set.
        test_target: what the runs that reached the target had on the test split, at worst.
        steps: how many steps a training run is expected to take; an algorithm may plan its schedule with it.
        max_time: the time limit in the clock's unit; without a clock it is ``steps`` if not given.
        eval_period: least time between evaluations.
        batch_size: unless the algorithm has its own.
        variants: held-out changes of this workload, for :func:`telos.trials.apply_variant_rule`.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: LossFunction
    metric: Callable[[Tensor, Tensor], float]
    mode: Mode
    train: Batch
    validation: Batch
    test: Batch | None = None
    target: float | None = None
    test_target: float | None = None
    steps: int = 1000
    max_time: float | None = None
    eval_period: float = 10.0
    batch_size: int = 64
    variants: tuple[Workload, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode of {self.name} must be 'min' or 'max', got {self.mode!r}")
        for name in ("steps", "eval_period", "batch_size"):
            _check_positive(f"{name} of {self.name}", getattr(self, name))
        if self.max_time is not None:
            _check_positive(f"max_time of {self.name}", self.max_time)
        if nested := [variant.name for variant in self.variants if variant.variants]:
            raise ValueError(f"variants of {self.name} must have no variants of their own, got {nested}")


class TrainingAlgorithm(Protocol):
    """A complete training algorithm; :class:`OptimizerAlgorithm` is one.

    All of its calls are timed. It may not change the loss, or the model other than its parameters.
    """

    @property
    def name(self) -> str:
        """A short name."""
        ...

    @property
    def space(self) -> SearchSpace | FixedPoints | None:
        """Where its hyper-parameters are searched; ``None`` for one without any, which tunes itself."""
        ...

    @property
    def batch_size(self) -> int | None:
        """How many examples a batch has; ``None`` for the workload's own choice."""
        ...

    def init(self, model: nn.Module, hyperparameters: Hyperparameters, steps: int) -> Any:
        """The state before the first step; ``steps`` is how many training is expected to take."""
        ...

    def step(self, state: Any, model: nn.Module, loss: LossFunction, batches: Iterator[Batch]) -> None:
        """One update of the parameters; it takes as many of the endless ``batches`` as it wants.

        It raises :class:`telos.fit.Diverged` where the loss is not finite.
        """
        ...

    def prepare_eval(self, state: Any, model: nn.Module) -> nn.Module:
        """The model to evaluate: the one that is trained, or for example one with averaged weights."""
        ...


@dataclass
class OptimizerState:
    """What :class:`OptimizerAlgorithm` carries from step to step."""

    optimizer: Optimizer
    scheduler: LambdaLR | None
    averaged: AveragedModel | None


@dataclass(frozen=True)
class OptimizerAlgorithm:
    """An optimizer with a learning-rate schedule and averaged weights, as a training algorithm.

    Args:
        name: a short name.
        optimizer: makes it from parameters and hyper-parameters.
        space: where the hyper-parameters are searched; ``None`` if there are none.
        schedule: the share of the expected steps that are done to the factor of the learning rate.
        average: decay of an exponential moving average of the weights, which is what is evaluated.
        batch_size: examples a batch; the workload's own if not given.

    Example:
        >>> import torch
        >>> OptimizerAlgorithm(
        ...     "sgd",
        ...     lambda parameters, chosen: torch.optim.SGD(parameters, lr=chosen["learning_rate"]),
        ...     FixedPoints(({"learning_rate": 0.1},)),
        ... ).name
        'sgd'
    """

    name: str
    optimizer: Callable[[Iterable[nn.Parameter], Hyperparameters], Optimizer]
    space: SearchSpace | FixedPoints | None = None
    schedule: Callable[[float], float] | None = None
    average: float | None = None
    batch_size: int | None = None

    def init(self, model: nn.Module, hyperparameters: Hyperparameters, steps: int) -> OptimizerState:
        """Optimizer, schedule and average."""
        optimizer, schedule = self.optimizer(model.parameters(), hyperparameters), self.schedule
        return OptimizerState(
            optimizer,
            None if schedule is None else LambdaLR(optimizer, lambda step: schedule(step / steps)),
            None
            if self.average is None
            else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.average)),
        )

    def step(
        self, state: OptimizerState, model: nn.Module, loss: LossFunction, batches: Iterator[Batch]
    ) -> None:
        """One batch, one step."""
        batch = next(batches)
        value = loss(model(batch["inputs"]), batch["target"])
        if not math.isfinite(value.item()):
            raise Diverged(f"the loss is {value.item()}")
        state.optimizer.zero_grad()
        value.backward()
        state.optimizer.step()
        if state.scheduler is not None:
            state.scheduler.step()
        if state.averaged is not None:
            state.averaged.update_parameters(model)

    def prepare_eval(self, state: OptimizerState, model: nn.Module) -> nn.Module:
        """The model, or its average."""
        return model if state.averaged is None else state.averaged


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What became of one training run.

    Attributes:
        time: (E,) time spent before each evaluation.
        metric: (E,) on the validation split.
        test_metric: (E,) on the test split; empty where there is none.
        status: ``"reached"``, ``"missed"`` or ``"diverged"``.
        steps: how many were taken.
        spent: the time of all calls of the algorithm.
    """

    time: Floats
    metric: Floats
    test_metric: Floats
    status: str
    steps: int
    spent: float


@dataclass(frozen=True)
class Ruleset:
    """How algorithms may tune, and how often everything is repeated.

    Attributes:
        studies: repetitions; the median over them counts.
        trials: of each study; the fastest counts. 1 for an algorithm that tunes itself.
        time_factor: multiplies the time limit.
        self_tuning: whether algorithms must be without hyper-parameters.
    """

    studies: int
    trials: int
    time_factor: float = 1.0
    self_tuning: bool = False

    def __post_init__(self) -> None:
        for name in ("studies", "trials", "time_factor"):
            _check_positive(name, getattr(self, name))
        if self.self_tuning and self.trials != 1:
            raise ValueError(f"trials must be 1 where algorithms tune themselves, got {self.trials}")


EXTERNAL_TUNING = Ruleset(studies=3, trials=5)
"""Three studies of five quasi-random trials; the paper's first version had five studies of twenty."""

SELF_TUNING = Ruleset(studies=3, trials=1, time_factor=1.5, self_tuning=True)
"""Three runs without hyper-parameters in one and a half times the time; in the paper three times."""


def wall_clock(device: str | torch.device = "cpu") -> Clock:
    """Seconds, read when the device has finished what it was given.

    Warm the device up before the first trial; what a compiler takes counts.

    Args:
        device: whose queue to wait for.

    Returns:
        A clock for :func:`run_trial`.

    Example:
        >>> clock = wall_clock()
        >>> clock() <= clock()
        True
    """
    device = torch.device(device)

    def read() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return read


def run_trial(
    workload: Workload,
    algorithm: TrainingAlgorithm,
    hyperparameters: Hyperparameters,
    *,
    seed: int,
    clock: Clock | None = None,
    max_time: float | None = None,
    max_steps: int | None = None,
) -> Trajectory:
    """Train until the target is reached or the time is over.

    The time of all calls of the algorithm accumulates, evaluations are free. After a step that ends at least
    ``workload.eval_period`` after the last evaluation the model is prepared for the next one (timed), and
    evaluated if the time is not over. Initialisation and batch order follow from the workload's name and the
    seed, so that all algorithms share them; torch's global generator is as before afterwards.

    Args:
        workload: what to train; without a target training goes on until the time is over.
        algorithm: how.
        hyperparameters: of the algorithm.
        seed: of initialisation, batch order and whatever the training draws.
        clock: tells the time in any unit; by default every step takes 1 and all else nothing.
        max_time: the limit in the clock's unit, instead of the workload's own.
        max_steps: ends training earlier.

    Returns:
        The evaluations. A run whose loss is not finite ends there as ``"diverged"``.

    Raises:
        ValueError: if there is a clock but no time limit.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> from telos.trials.small_workloads import baseline_algorithms, small_workloads
        >>> workload = small_workloads()["digits_linear"]
        >>> run = run_trial(workload, baseline_algorithms()["heavy_ball"],
        ...                 {"learning_rate": 0.1, "one_minus_momentum": 0.1, "weight_decay": 1e-6}, seed=0)
        >>> run.status, 10 <= run.spent <= 200, run.steps == run.spent, float(run.metric[-1]) >= 0.93
        ('reached', True, True, True)
    """
    limit = _limit(workload, clock) if max_time is None else max_time
    _check_positive("max_time", limit)
    times: list[float] = []
    metric: list[float] = []
    test_metric: list[float] = []
    steps, spent, evaluated_at, status = 0, 0.0, 0.0, "missed"
    now = clock or (lambda: float(steps))

    def timed(call: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal spent
        start = now()
        try:
            return call(*arguments)
        finally:
            spent += now() - start

    def take_step() -> None:
        nonlocal steps
        steps += 1
        algorithm.step(state, model, workload.loss, batches)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(workload.name, seed, "model"))
        model = workload.model().to(workload.train["inputs"].device).train()
        torch.manual_seed(derive_seed(workload.name, seed, "training"))
        order = torch.Generator().manual_seed(derive_seed(workload.name, seed, "order"))
        batches = _endless(Batches(workload.train, algorithm.batch_size or workload.batch_size, order))
        state = timed(algorithm.init, model, hyperparameters, workload.steps)
        while spent < limit and (max_steps is None or steps < max_steps):
            try:
                timed(take_step)
            except Diverged:
                status = "diverged"
                break
            if spent - evaluated_at < workload.eval_period:
                continue
            prepared = timed(algorithm.prepare_eval, state, model)
            evaluated_at = spent
            if spent > limit:
                break
            times.append(spent)
            metric.append(_evaluate(workload, prepared, workload.validation))
            if workload.test is not None:
                test_metric.append(_evaluate(workload, prepared, workload.test))
            if workload.target is not None and _reaches(metric[-1], workload.target, workload.mode):
                status = "reached"
                break
    return Trajectory(np.array(times), np.array(metric), np.array(test_metric), status, steps, spent)


def run_benchmark(
    workloads: Iterable[Workload],
    algorithms: Sequence[TrainingAlgorithm],
    ruleset: Ruleset = EXTERNAL_TUNING,
    *,
    clock: Clock | None = None,
    seed: int = 0,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> pl.DataFrame:
    """Every algorithm on every workload and its variants, with the same tuning budget.

    An algorithm draws its hyper-parameters once for each study and uses them on all workloads. A trial ends
    as ``"overtaken"`` when it has taken as long as the fastest one before it in its study: it cannot change
    the minimum.

    Args:
        workloads: with their targets.
        algorithms: of different names.
        ruleset: numbers of studies and trials.
        clock: see :func:`run_trial`.
        seed: of initialisations, batch orders and searches.
        on_trial: called with every row as it ends.

    Returns:
        One row for each trial, as :func:`telos.trials.study_times` wants them: ``algorithm``, ``workload``,
        ``study``, ``trial``, the lists ``time``, ``metric`` and ``test_metric``, and ``status``, ``steps``,
        ``spent`` and ``hyperparameters`` (JSON).

    Raises:
        ValueError: for a workload without target, two of one name, or an algorithm that does not fit the
            ruleset.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> from telos.trials.small_workloads import baseline_algorithms, small_workloads
        >>> workloads, algorithms = [small_workloads()["digits_linear"]], baseline_algorithms()
        >>> runs = run_benchmark(workloads, [algorithms["adamw"]], Ruleset(studies=1, trials=2))
        >>> runs.select("algorithm", "workload", "study", "trial").rows()
        [('adamw', 'digits_linear', 0, 0), ('adamw', 'digits_linear', 0, 1)]
    """
    import polars as pl

    every, _ = with_variants(workloads)
    _check_names("workloads", [workload.name for workload in every])
    _check_names("algorithms", [algorithm.name for algorithm in algorithms])
    if aimless := [workload.name for workload in every if workload.target is None]:
        raise ValueError(f"workloads must have a target (see set_target), got none for {', '.join(aimless)}")
    for algorithm in algorithms:
        if ruleset.self_tuning != (algorithm.space is None):
            raise ValueError(
                f"{algorithm.name} has {'no' if algorithm.space is None else 'a'} search space, which does "
                f"not fit a ruleset of {'self-' if ruleset.self_tuning else 'external '}tuning"
            )
    rows = []
    for study in range(ruleset.studies):
        points = [_points(algorithm, ruleset.trials, (seed, study)) for algorithm in algorithms]
        for workload in every:
            fastest = [_limit(workload, clock) * ruleset.time_factor] * len(algorithms)
            for trial in range(ruleset.trials):
                # algorithms take turns, so that a machine that is busy for a while slows all of them alike
                for place, algorithm in enumerate(algorithms):
                    chosen, first = points[place][trial], fastest[place]
                    ran = run_trial(
                        workload,
                        algorithm,
                        chosen,
                        seed=derive_seed(seed, study, trial),
                        clock=clock,
                        max_time=first,
                    )
                    full = _limit(workload, clock) * ruleset.time_factor
                    status = "overtaken" if ran.status == "missed" and first < full else ran.status
                    if ran.status == "reached":
                        fastest[place] = min(first, float(ran.time[-1]))
                    row = {
                        "algorithm": algorithm.name,
                        "workload": workload.name,
                        "study": study,
                        "trial": trial,
                        "time": ran.time.tolist(),
                        "metric": ran.metric.tolist(),
                        "test_metric": ran.test_metric.tolist(),
                        "status": status,
                        "steps": ran.steps,
                        "spent": ran.spent,
                        "hyperparameters": json.dumps(chosen),
                    }
                    rows.append(row)
                    if on_trial is not None:
                        on_trial(row)
    lists = dict.fromkeys(("time", "metric", "test_metric"), pl.List(pl.Float64))
    return pl.DataFrame(rows, schema_overrides=lists)


def set_target(
    workload: Workload,
    algorithms: Sequence[TrainingAlgorithm],
    *,
    trials: int = 200,
    seeds: int = 20,
    clock: Clock | None = None,
    seed: int = 0,
) -> Workload:
    """Set a workload's targets to what good, well-tuned baselines reach.

    Every algorithm runs ``trials`` quasi-random configurations for ``workload.steps`` steps. The one with the
    best validation metric runs again with ``seeds`` seeds::

        target      = median over seeds of the best validation metric
        test_target = worst test metric among the runs that reach the target
        max_time    = 4/3 of the time of the longest of these runs

    Args:
        workload: its variants get targets of their own in the same way.
        algorithms: the baselines; :func:`telos.trials.baseline_algorithms` has the paper's four.
        trials: configurations of each.
        seeds: repetitions of the best.
        clock: see :func:`run_trial`.
        seed: of searches, initialisations and batch orders.

    Returns:
        The workload with its targets and its time limit. RECONSTRUCTED: a run's test metric is that of the
        evaluation with its best validation metric.

    Raises:
        ValueError: for no algorithm, one without a search space, or where no run gave a number.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> from dataclasses import replace
        >>> from telos.trials.small_workloads import baseline_algorithms, small_workloads
        >>> workload = replace(small_workloads()["digits_linear"], steps=30)
        >>> found = set_target(workload, [baseline_algorithms()["adamw"]], trials=2, seeds=3)
        >>> 0.1 < found.target < 1, found.test_target, found.max_time
        (True, None, 40.0)
    """
    _check_names("algorithms", [algorithm.name for algorithm in algorithms])
    _check_positive("seeds", seeds)
    if tuned := [algorithm.name for algorithm in algorithms if algorithm.space is None]:
        raise ValueError(f"algorithms must have a search space, got none for {', '.join(tuned)}")
    sign = 1.0 if workload.mode == "min" else -1.0
    endless = replace(workload, target=None, variants=())
    run = partial(run_trial, endless, clock=clock, max_time=math.inf, max_steps=workload.steps)

    def best(ran: Trajectory) -> int | None:
        signed = np.where(np.isnan(ran.metric), np.inf, sign * ran.metric)
        return int(signed.argmin()) if np.isfinite(signed).any() else None

    candidates: list[tuple[float, int, TrainingAlgorithm, Hyperparameters]] = []
    for algorithm in algorithms:
        for trial, chosen in enumerate(_points(algorithm, trials, (seed, "target"))):
            ran = run(algorithm, chosen, seed=derive_seed(seed, "target", trial))
            if (place := best(ran)) is not None:
                candidates.append((sign * float(ran.metric[place]), len(candidates), algorithm, chosen))
    if not candidates:
        raise ValueError(f"no run of {workload.name} gave a finite metric within {workload.steps} steps")
    _, _, algorithm, chosen = min(candidates, key=lambda found: found[:2])
    again = [run(algorithm, chosen, seed=derive_seed(seed, "again", i)) for i in range(seeds)]
    ends = [(ran, place) for ran in again if (place := best(ran)) is not None]
    if not ends:
        raise ValueError(f"the best configuration on {workload.name} diverges with every other seed")
    target = float(np.median([ran.metric[place] for ran, place in ends]))
    tests = [
        sign * float(ran.test_metric[place])
        for ran, place in ends
        if len(ran.test_metric) and _reaches(float(ran.metric[place]), target, workload.mode)
    ]
    return replace(
        workload,
        target=target,
        test_target=sign * max(tests) if tests else None,
        max_time=4 / 3 * max(ran.spent for ran in again),
        variants=tuple(
            set_target(variant, algorithms, trials=trials, seeds=seeds, clock=clock, seed=seed)
            for variant in workload.variants
        ),
    )


def with_variants(workloads: Iterable[Workload]) -> tuple[list[Workload], list[int | None]]:
    """All workloads in one row: each one followed by its variants.

    Args:
        workloads: the base workloads.

    Returns:
        The row, and for each of its entries the place of its base workload (``None`` for a base workload), as
        :func:`telos.trials.apply_variant_rule` wants it.

    Example:
        >>> from telos.trials.small_workloads import small_workloads
        >>> every, base_of = with_variants(small_workloads().values())
        >>> [workload.name for workload in every][1:3], base_of[1:3]
        (['digits_mlp', 'digits_mlp_scaled'], [None, 1])
    """
    every: list[Workload] = []
    base_of: list[int | None] = []
    for workload in workloads:
        place = len(every)
        every += [workload, *workload.variants]
        base_of += [None, *[place] * len(workload.variants)]
    return every, base_of


def targets_of(workloads: Iterable[Workload]) -> dict[str, tuple[float, Mode]]:
    """Target and mode of every workload, as :func:`telos.trials.study_times` wants them.

    Args:
        workloads: those of :func:`with_variants`, for example.

    Raises:
        ValueError: for a workload without target.

    Example:
        >>> from telos.trials.small_workloads import small_workloads
        >>> targets_of([small_workloads()["digits_linear"]])
        {'digits_linear': (0.93, 'max')}
    """
    found: dict[str, tuple[float, Mode]] = {}
    for workload in workloads:
        if workload.target is None:
            raise ValueError(f"{workload.name} has no target (see set_target)")
        found[workload.name] = (workload.target, workload.mode)
    return found


def _limit(workload: Workload, clock: Clock | None) -> float:
    if workload.max_time is not None:
        return workload.max_time
    if clock is not None:
        raise ValueError(f"{workload.name} must have max_time in the clock's unit, got none")
    return float(workload.steps)


def _points(algorithm: TrainingAlgorithm, count: int, purpose: tuple[Any, ...]) -> list[Hyperparameters]:
    if algorithm.space is None:
        return [{} for _ in range(count)]
    return algorithm.space.sample(count, derive_seed(*purpose, algorithm.name))


def _endless(batches: Batches) -> Iterator[Batch]:
    while True:
        yield from batches


@torch.no_grad()
def _evaluate(workload: Workload, model: nn.Module, split: Batch) -> float:
    was_training = model.training
    outputs = model.eval()(split["inputs"])
    model.train(was_training)
    return float(workload.metric(outputs, split["target"]))


def _reaches(value: float, target: float, mode: Mode) -> bool:
    return value <= target if mode == "min" else value >= target


def _check_names(what: str, names: list[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{what} must be at least one, of different names, got {names}")
