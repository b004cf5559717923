"""The protocol with scripted algorithms and clocks, and the built-in workloads with real ones."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from telos.fit import Diverged
from telos.losses import choice, integers, log_uniform, uniform
from telos.trials.scoring import study_times
from telos.trials.small_workloads import baseline_algorithms, small_workloads, warmup_cosine
from telos.trials.tasks import Batch
from telos.trials.workloads import (
    EXTERNAL_TUNING,
    SELF_TUNING,
    FixedPoints,
    OptimizerAlgorithm,
    Ruleset,
    SearchSpace,
    Workload,
    run_benchmark,
    run_trial,
    set_target,
    targets_of,
    wall_clock,
    with_variants,
)

DATA = {"inputs": torch.arange(6.0).unsqueeze(1), "target": torch.zeros(6, 1)}


class Clock:
    """Stands still but when somebody works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, time: float) -> None:
        self.now += time


def squared_error(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).square().mean()


def workload(metric: Callable[[Tensor, Tensor], float], **changes: Any) -> Workload:
    """One weight, six examples; whatever metric a test wants."""
    plain: dict[str, Any] = {
        "name": "toy",
        "model": lambda: nn.Linear(1, 1, bias=False),
        "loss": squared_error,
        "metric": metric,
        "mode": "max",
        "train": DATA,
        "validation": DATA,
        "target": 0.5,
        "steps": 100,
        "batch_size": 2,
    }
    return Workload(**{**plain, **changes})


def scripted(values: list[float], clock: Clock | None = None) -> Callable[[Tensor, Tensor], float]:
    """A metric that gives these values one after the other, and takes long."""
    left = iter(values)

    def metric(outputs: Tensor, target: Tensor) -> float:
        if clock is not None:
            clock.work(1000.0)
        return next(left)

    return metric


@dataclass
class Worker:
    """An algorithm that trains nothing and takes the time it is told."""

    clock: Clock | None = None
    costs: dict[str, float] = field(default_factory=lambda: {"init": 2.0, "step": 3.0, "prepare": 1.0})
    name: str = "worker"
    space: SearchSpace | FixedPoints | None = None
    batch_size: int | None = None
    diverges_at: int | None = None

    def _work(self, what: str) -> None:
        if self.clock is not None:
            self.clock.work(self.costs[what])

    def init(self, model: nn.Module, hyperparameters: dict[str, Any], steps: int) -> list[int]:
        self._work("init")
        return [0]

    def step(self, state: list[int], model: nn.Module, loss: Any, batches: Iterator[Batch]) -> None:
        self._work("step")
        state[0] += 1
        if state[0] == self.diverges_at:
            raise Diverged("told to")

    def prepare_eval(self, state: list[int], model: nn.Module) -> nn.Module:
        self._work("prepare")
        return model


# one trial


def test_the_clock_runs_for_the_algorithm_alone() -> None:
    clock = Clock()
    toy = workload(scripted([0.1, 0.2, 0.5], clock), eval_period=5.0, max_time=99.0)
    ran = run_trial(toy, Worker(clock), {}, seed=0, clock=clock)
    # init 2, step 5: evaluate at 6; steps 9 and 12: at 13; steps 16 and 19: at 20
    assert ran.time.tolist() == [6.0, 13.0, 20.0]
    assert ran.metric.tolist() == [0.1, 0.2, 0.5]
    assert (ran.status, ran.steps, ran.spent) == ("reached", 5, 20.0)
    assert clock.now == 3020.0


def test_an_evaluation_after_the_limit_does_not_count() -> None:
    for limit, times in ((20.0, [6.0, 13.0, 20.0]), (19.5, [6.0, 13.0]), (12.5, [6.0]), (5.5, [])):
        clock = Clock()
        toy = workload(scripted([0.1, 0.2, 0.5], clock), eval_period=5.0, max_time=limit)
        ran = run_trial(toy, Worker(clock), {}, seed=0, clock=clock)
        assert ran.time.tolist() == times
        assert ran.status == ("reached" if len(times) == 3 else "missed")


def test_without_a_clock_steps_are_counted() -> None:
    toy = workload(scripted([0.1, math.nan, 0.4, 0.7]), eval_period=10.0)
    ran = run_trial(toy, Worker(), {}, seed=0)
    assert ran.time.tolist() == [10, 20, 30, 40]
    assert (ran.status, ran.steps, ran.spent) == ("reached", 40, 40.0)
    ran = run_trial(replace(toy, metric=scripted([0.1] * 9), steps=25), Worker(), {}, seed=0)
    assert ran.time.tolist() == [10, 20]
    assert (ran.status, ran.steps) == ("missed", 25)
    ran = run_trial(replace(toy, metric=scripted([0.1] * 9), max_time=30.0), Worker(), {}, seed=0)
    assert ran.time.tolist() == [10, 20, 30]


def test_errors_are_reached_from_above() -> None:
    toy = workload(scripted([0.9, 0.6, 0.5, 0.4]), mode="min")
    assert run_trial(toy, Worker(), {}, seed=0).time.tolist() == [10, 20, 30]


def test_without_a_target_training_goes_on_until_the_end() -> None:
    toy = workload(scripted([1.0] * 10), target=None)
    assert len(run_trial(toy, Worker(), {}, seed=0).time) == 10
    assert (
        len(run_trial(replace(toy, metric=scripted([1.0] * 10)), Worker(), {}, seed=0, max_steps=35).time)
        == 3
    )


def test_a_diverging_run_ends_there() -> None:
    clock = Clock()
    toy = workload(scripted([0.1, 0.2], clock), eval_period=5.0, max_time=99.0)
    ran = run_trial(toy, Worker(clock, diverges_at=3), {}, seed=0, clock=clock)
    assert (ran.status, ran.steps, ran.spent) == ("diverged", 3, 12.0)  # the last step is paid for
    assert ran.time.tolist() == [6.0]
    sgd = OptimizerAlgorithm("sgd", lambda parameters, chosen: SGD(parameters, lr=chosen["lr"]))
    assert run_trial(workload(scripted([0.0] * 99)), sgd, {"lr": 1e30}, seed=0).status == "diverged"


def test_a_clock_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="toy must have max_time"):
        run_trial(workload(scripted([])), Worker(), {}, seed=0, clock=Clock())
    with pytest.raises(ValueError, match="max_time must be above 0"):
        run_trial(workload(scripted([])), Worker(), {}, seed=0, max_time=0.0)


@dataclass
class Witness(Worker):
    """Notes what it is given."""

    take: int = 1
    seen: list[Any] = field(default_factory=list)

    def init(self, model: nn.Module, hyperparameters: dict[str, Any], steps: int) -> list[int]:
        self.seen += [model.weight.item(), hyperparameters, steps, torch.rand(1).item()]
        return [0]

    def step(self, state: list[int], model: nn.Module, loss: Any, batches: Iterator[Batch]) -> None:
        self.seen += [next(batches)["inputs"].flatten().tolist() for _ in range(self.take)]


def test_all_algorithms_share_initialisation_and_batches() -> None:
    toy = workload(scripted([0.0] * 99), steps=6)
    before = torch.random.get_rng_state()
    first, second, other = Witness(), Witness(name="second"), Witness()
    run_trial(toy, first, {"a": 1}, seed=3)
    torch.rand(5)
    run_trial(toy, second, {"a": 1}, seed=3)
    run_trial(toy, other, {"a": 1}, seed=4)
    assert first.seen == second.seen
    assert first.seen[1:3] == [{"a": 1}, 6]
    assert first.seen[0] != other.seen[0]
    assert first.seen[4:] != other.seen[4:]
    for batches in (first.seen[4:7], first.seen[7:10]):  # each epoch has every example once
        assert sorted(itertools.chain(*batches)) == [0, 1, 2, 3, 4, 5]
    torch.random.set_rng_state(before)
    expected = torch.rand(1)
    torch.random.set_rng_state(before)
    run_trial(toy, Witness(), {}, seed=0)
    assert torch.rand(1) == expected  # torch's own generator is left alone


def test_an_algorithm_may_choose_its_batches() -> None:
    toy = workload(scripted([0.0] * 99), steps=2)
    greedy, large = Witness(take=2), Witness(batch_size=5)
    run_trial(toy, greedy, {}, seed=0)
    run_trial(toy, large, {}, seed=0)
    assert [len(batch) for batch in greedy.seen[4:]] == [2, 2, 2, 2]
    assert [len(batch) for batch in large.seen[4:]] == [5, 1]


def test_the_prepared_model_is_evaluated_in_evaluation_mode() -> None:
    modes = []

    class Model(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(inputs)

    toy = workload(
        lambda outputs, target: float(outputs.requires_grad),
        model=lambda: Model(1, 1),
        eval_period=1.0,
        test=DATA,
        steps=2,
    )
    sgd = OptimizerAlgorithm("sgd", lambda parameters, chosen: SGD(parameters, lr=0.01))
    ran = run_trial(toy, sgd, {}, seed=0)
    assert modes == [True, False, False, True, False, False]  # a step, validation, test
    assert ran.metric.tolist() == ran.test_metric.tolist() == [0.0, 0.0]


def test_an_optimizer_with_schedule_and_average_by_hand() -> None:
    """Loss (w x)^2 on the single example x = 1: each step multiplies w by 1 - 2 lr."""
    one = {"inputs": torch.ones(1, 1), "target": torch.zeros(1, 1)}
    toy = workload(
        lambda outputs, target: outputs.item(),
        train=one,
        validation=one,
        target=None,
        eval_period=1.0,
        steps=4,
    )
    weight = [run_trial(replace(toy, steps=1), Witness(), {}, seed=0).metric.item()]
    average = [weight[0]]
    for step in range(4):
        weight.append(weight[-1] * (1 - 2 * 0.1 * (1 - step / 4)))
        average.append(weight[-1] if step == 0 else 0.75 * average[-1] + 0.25 * weight[-1])

    def sgd(**options: Any) -> OptimizerAlgorithm:
        return OptimizerAlgorithm(
            "sgd",
            lambda parameters, chosen: SGD(parameters, lr=chosen["lr"]),
            schedule=lambda share: 1 - share,
            **options,
        )

    assert run_trial(toy, sgd(), {"lr": 0.1}, seed=0).metric == pytest.approx(weight[1:], rel=1e-5)
    ran = run_trial(toy, sgd(average=0.75), {"lr": 0.1}, seed=0)
    assert ran.metric == pytest.approx(average[1:], rel=1e-5)


def test_the_wall_clock_tells_seconds() -> None:
    toy = workload(scripted([0.0] * 999), max_time=0.05, eval_period=0.01)
    sgd = OptimizerAlgorithm("sgd", lambda parameters, chosen: SGD(parameters, lr=0.0))
    ran = run_trial(toy, sgd, {}, seed=0, clock=wall_clock())
    assert ran.status == "missed"
    assert ran.spent >= 0.05
    assert (np.diff(ran.time) >= 0.01).all()
    assert (ran.time <= 0.05).all()


# hyper-parameters


def test_points_of_a_space_are_spread_and_nested() -> None:
    space = SearchSpace(
        {
            "lr": log_uniform(1e-4, 1.0),
            "beta": uniform(0.5, 0.9),
            "depth": integers(1, 3),
            "kind": choice("a", "b"),
        }
    )
    points = space.sample(64, seed=5)
    assert points[:10] == space.sample(10, seed=5)
    assert points != space.sample(64, seed=6)
    # the first dimension of a scrambled Halton sequence: of each four points in a row, one in every quarter
    quarters = [math.floor(math.log10(point["lr"])) for point in points]
    assert all(sorted(quarters[i : i + 4]) == [-4, -3, -2, -1] for i in range(0, 64, 4))
    assert all(0.5 <= point["beta"] <= 0.9 for point in points)
    assert {point["depth"] for point in points} == {1, 2, 3}
    assert {point["kind"] for point in points} == {"a", "b"}
    with pytest.raises(ValueError, match="at least one range"):
        SearchSpace({})
    with pytest.raises(ValueError, match="count must be above 0"):
        space.sample(0, seed=0)


def test_fixed_points_are_drawn_without_replacement() -> None:
    points = FixedPoints(tuple({"lr": float(i)} for i in range(5)))
    drawn = [tuple(point["lr"] for point in points.sample(5, seed)) for seed in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in drawn)
    assert len(set(drawn)) > 10
    assert len({order[0] for order in drawn}) == 5
    points.sample(1, 0)[0]["lr"] = -1.0  # a caller's change must not come back
    assert all(point["lr"] >= 0 for point in points.sample(5, 0))
    with pytest.raises(ValueError, match="at most the 5 points"):
        points.sample(6, seed=0)


def test_rulesets() -> None:
    assert (EXTERNAL_TUNING.studies, EXTERNAL_TUNING.trials, EXTERNAL_TUNING.time_factor) == (3, 5, 1.0)
    assert (SELF_TUNING.studies, SELF_TUNING.trials, SELF_TUNING.time_factor) == (3, 1, 1.5)
    with pytest.raises(ValueError, match="studies must be above 0"):
        Ruleset(0, 1)
    with pytest.raises(ValueError, match="trials must be 1 where"):
        Ruleset(3, 5, self_tuning=True)


# the benchmark


@dataclass
class Learner(Worker):
    """Sets the weight to steps times speed; the speed is its hyper-parameter."""

    space: Any = field(default_factory=lambda: SearchSpace({"speed": log_uniform(0.1, 10.0)}))
    seen: list[float] = field(default_factory=list)

    def init(self, model: nn.Module, hyperparameters: dict[str, Any], steps: int) -> list[float]:
        self.seen.append(hyperparameters["speed"])
        return [hyperparameters["speed"]]

    def step(self, state: list[float], model: nn.Module, loss: Any, batches: Iterator[Batch]) -> None:
        with torch.no_grad():
            model.weight.add_(state[0])
        if self.clock is not None:
            self.clock.work(1.0)


def track(name: str, target: float, **changes: Any) -> Workload:
    """Reached when the weight, which starts at 0, exceeds the target; learners take about target / speed."""

    def model() -> nn.Module:
        made = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(made.weight)
        return made

    one = {"inputs": torch.ones(1, 1), "target": torch.zeros(1, 1)}
    changes = {"train": one, "validation": one, "eval_period": 1.0, **changes}
    return workload(lambda outputs, _: outputs.item(), name=name, model=model, target=target, **changes)


def test_a_benchmark_by_hand() -> None:
    base = track("far", 40.5, variants=(track("farther", 80.5),))
    learners = [Learner(name="first"), Learner(name="second")]
    rows: list[dict[str, Any]] = []
    runs = run_benchmark([track("near", 20.5), base], learners, seed=3, on_trial=rows.append)
    assert len(runs) == len(rows) == 2 * 3 * 3 * 5
    every, base_of = with_variants([track("near", 20.5), base])
    assert [made.name for made in every] == ["near", "far", "farther"]
    assert base_of == [None, None, 1]
    found = study_times(runs, targets_of(every))
    for i, learner in enumerate(learners):
        speeds = np.array(learner.seen).reshape(3, 3, 5)  # studies, workloads, trials
        assert (speeds == speeds[:, :1]).all()  # drawn once for each study
        for j, goal in enumerate((20.5, 40.5, 80.5)):
            steps = np.ceil(goal / speeds[:, j].max(1))
            assert found.times[i, j].tolist() == np.where(steps <= 100, steps, np.inf).tolist()
    assert learners[0].seen != learners[1].seen
    chosen = [
        json.loads(text)["speed"] for text in runs.filter(pl.col("algorithm") == "first")["hyperparameters"]
    ]
    assert chosen == learners[0].seen


def test_overtaken_trials_change_nothing() -> None:
    learner, toy = Learner(), track("near", 20.5)
    runs = run_benchmark([toy], [learner], Ruleset(studies=2, trials=8), seed=1)
    assert "overtaken" in set(runs["status"])
    unlimited = [
        {
            "algorithm": "worker",
            "workload": "near",
            "study": i // 8,
            "trial": i % 8,
            "time": ran.time,
            "metric": ran.metric,
        }
        for i, speed in enumerate(learner.seen[:])
        for ran in [run_trial(toy, Learner(), {"speed": speed}, seed=0)]
    ]
    targets = targets_of([toy])
    assert study_times(runs, targets).times.tolist() == study_times(unlimited, targets).times.tolist()
    full = sum(len(run["time"]) for run in unlimited)
    assert runs["steps"].sum() < full


def test_two_runs_of_a_benchmark_are_equal() -> None:
    def ran(seed: int) -> pl.DataFrame:
        return run_benchmark(
            [replace(small_workloads()["digits_linear"], steps=20)],
            list(baseline_algorithms().values())[2:],
            Ruleset(1, 2),
            seed=seed,
        )

    assert ran(0).equals(ran(0))
    assert not ran(0).equals(ran(1))


def test_self_tuning_algorithms_have_more_time_and_no_hyperparameters() -> None:
    toy = track("never", 1e9)
    runs = run_benchmark([toy], [Worker()], SELF_TUNING)
    assert runs["steps"].to_list() == [150, 150, 150]
    assert set(runs["hyperparameters"]) == {"{}"}
    assert set(runs["status"]) == {"missed"}
    with pytest.raises(
        ValueError, match="worker has a search space, which does not fit a ruleset of self-tuning"
    ):
        run_benchmark([toy], [Learner()], SELF_TUNING)
    with pytest.raises(ValueError, match="worker has no search space"):
        run_benchmark([toy], [Worker()], EXTERNAL_TUNING)


def test_a_benchmark_with_a_clock() -> None:
    clock = Clock()
    toy = track("near", 20.5, max_time=1e6)
    runs = run_benchmark(
        [toy], [Learner(clock, {"prepare": 0.0}, batch_size=None)], Ruleset(1, 1), clock=clock
    )
    assert runs["time"][0].to_list() == [float(i + 1) for i in range(len(runs["time"][0]))]
    with pytest.raises(ValueError, match="must have max_time"):
        run_benchmark([replace(toy, max_time=None)], [Learner(clock)], Ruleset(1, 1), clock=clock)


def test_a_benchmark_says_what_is_wrong() -> None:
    toy = track("near", 20.5)
    with pytest.raises(ValueError, match="got none for near"):
        run_benchmark([replace(toy, target=None)], [Learner()])
    with pytest.raises(ValueError, match="has no target"):
        targets_of([replace(toy, target=None)])
    with pytest.raises(ValueError, match="workloads must be at least one, of different names"):
        run_benchmark([toy, toy], [Learner()])
    with pytest.raises(ValueError, match="algorithms must be at least one, of different names, got"):
        run_benchmark([toy], [])


def test_a_workload_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="mode of near must be"):
        track("near", 1.0, mode="best")
    for name in ("steps", "eval_period", "batch_size", "max_time"):
        with pytest.raises(ValueError, match=f"{name} of near must be above 0, got 0"):
            track("near", 1.0, **{name: 0})
    inner = track("middle", 1.0, variants=(track("inside", 1.0),))
    with pytest.raises(ValueError, match=r"no variants of their own, got \['middle'\]"):
        track("near", 1.0, variants=(inner,))


# targets


@dataclass
class Noisy(Worker):
    """Its metric is its quality plus noise that the seed of the run decides."""

    space: Any = field(default_factory=lambda: SearchSpace({"quality": uniform(0.0, 10.0)}))

    def init(self, model: nn.Module, hyperparameters: dict[str, Any], steps: int) -> list[float]:
        return [hyperparameters["quality"]]

    def step(self, state: list[float], model: nn.Module, loss: Any, batches: Iterator[Batch]) -> None:
        with torch.no_grad():
            model.weight.copy_(state[0] + torch.rand(1, 1))


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seeds", [5, 6])
def test_targets_by_hand(mode: Any, seeds: int) -> None:
    """Validation is the weight, test is minus it; only the repetitions of the best decide."""
    seen: dict[str, list[float]] = {"validation": [], "test": []}
    test = {"inputs": -torch.ones(1, 1), "target": torch.zeros(1, 1)}

    def metric(outputs: Tensor, target: Tensor) -> float:
        seen["validation" if outputs.item() > 0 else "test"].append(outputs.item())
        return outputs.item()

    toy = replace(track("noisy", 0.0, mode=mode, steps=4, test=test), metric=metric)
    found = set_target(toy, [Noisy(name="one"), Noisy(name="two")], trials=7, seeds=seeds)
    validation = np.array(seen["validation"]).reshape(14 + seeds, 4)
    tests = np.array(seen["test"]).reshape(14 + seeds, 4)
    best, places = (
        (validation.min(1), validation.argmin(1))
        if mode == "min"
        else (validation.max(1), validation.argmax(1))
    )
    # the repetitions have the quality of the best trial: within 1, the size of the noise
    assert abs(best[14:] - (best[:14].min() if mode == "min" else best[:14].max())).max() < 1
    assert found.target == np.median(best[14:])
    hits = best[14:] <= found.target if mode == "min" else best[14:] >= found.target
    assert hits.sum() == math.ceil(seeds / 2)
    there = tests[14:][np.arange(seeds), places[14:]][hits]
    assert found.test_target == (there.max() if mode == "min" else there.min())
    assert found.max_time == pytest.approx(16 / 3)


def test_targets_of_variants_and_of_time() -> None:
    clock = Clock()
    toy = track("near", 0.0, steps=9, variants=(track("variant", 0.0, steps=6),))
    found = set_target(toy, [Learner(clock, {"prepare": 0.5})], trials=3, seeds=2, clock=clock)
    # nine steps of 1 and nine preparations of a half
    assert found.max_time == pytest.approx(4 / 3 * 13.5)
    assert found.variants[0].max_time == pytest.approx(4 / 3 * 9.0)
    assert found.variants[0].target == pytest.approx(found.target * 6 / 9)
    assert found.test_target is None


def test_set_target_says_what_is_wrong() -> None:
    toy = track("near", 0.0)
    with pytest.raises(ValueError, match="must have a search space, got none for worker"):
        set_target(toy, [Worker()], trials=1, seeds=1)
    with pytest.raises(ValueError, match="seeds must be above 0"):
        set_target(toy, [Learner()], trials=1, seeds=0)
    with pytest.raises(ValueError, match="no run of near gave a finite metric within 5 steps"):
        set_target(replace(toy, metric=lambda o, t: math.nan, steps=5), [Learner()], trials=1, seeds=1)


# what comes with telos


GOOD = {
    "digits_linear": ("heavy_ball", {"learning_rate": 0.5, "one_minus_momentum": 0.1, "weight_decay": 1e-6}),
    "digits_mlp": ("nesterov", {"learning_rate": 0.3, "one_minus_momentum": 0.1, "weight_decay": 1e-6}),
    "digits_mlp_scaled": ("adamw", {"learning_rate": 1e-2, "one_minus_beta1": 0.1, "weight_decay": 1e-2}),
    "digits_deep": ("nadamw", {"learning_rate": 1e-2, "one_minus_beta1": 0.1, "weight_decay": 1e-2}),
    "diabetes": ("adamw", {"learning_rate": 3e-3, "one_minus_beta1": 0.1, "weight_decay": 1.0}),
    "teacher": ("nadamw", {"learning_rate": 1e-2, "one_minus_beta1": 0.1, "weight_decay": 1e-2}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_tuned_baseline_reaches_the_target_of_a_small_workload(name: str) -> None:
    every = {made.name: made for made in with_variants(small_workloads(seed=1).values())[0]}
    assert list(every) == list(GOOD)
    algorithm, chosen = GOOD[name]
    ran = run_trial(every[name], baseline_algorithms()[algorithm], chosen, seed=0)
    assert ran.status == "reached"
    assert ran.time[-1] <= every[name].steps / 2
    assert len(ran.time) > 1  # and not by luck at the first look
    assert every[name].train["inputs"].isfinite().all()


def test_small_workloads_depend_on_their_seed() -> None:
    first, again, other = small_workloads(0), small_workloads(0), small_workloads(1)
    for name, made in first.items():
        assert torch.equal(made.train["inputs"], again[name].train["inputs"])
        assert not torch.equal(made.train["inputs"], other[name].train["inputs"])


def test_baselines_stay_in_their_space() -> None:
    for name, algorithm in baseline_algorithms().items():
        assert algorithm.name == name
        assert isinstance(algorithm.space, SearchSpace)
        (chosen,) = algorithm.space.sample(1, seed=0)
        optimizer = algorithm.optimizer([nn.Parameter(torch.zeros(1))], chosen)
        group = optimizer.param_groups[0]
        assert group["lr"] == chosen["learning_rate"]
        assert group["weight_decay"] == chosen["weight_decay"]
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        assert momentum == pytest.approx(1 - chosen.get("one_minus_momentum", chosen.get("one_minus_beta1")))
    assert warmup_cosine(0.025) == 0.5
