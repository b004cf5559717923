"""Scores of a benchmark against numbers worked out by hand, numerical integration and the official code's."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import integrate, stats

from telos.trials.scoring import (
    apply_variant_rule,
    geometric_speedup,
    pairwise_speedups,
    performance_profile,
    performance_ratios,
    profile_score,
    profile_table,
    score_interval,
    score_table,
    study_time,
    study_times,
    time_to_target,
)
from tests.golden.adapters import Case

INF, NAN = math.inf, math.nan


def golden_algoperf(case: Case) -> dict:
    """Runs of several submissions to times, performance profiles and scores; a miss is written ``"inf"``."""
    params = case.params
    runs = [
        {**run, "algorithm": run["submission"], "time": plain(run["time"]), "metric": plain(run["metric"])}
        for run in sorted(case.inputs["runs"], key=lambda run: run["submission"])
    ]
    targets = {
        name: (aim["target"], "min" if aim["minimize"] else "max")
        for name, aim in sorted(params["targets"].items())
    }
    found = study_times(runs, targets)
    times = np.median(found.times, axis=2)
    tau = np.linspace(1.0, params["max_tau"], params["num_points"])
    return {
        "submissions": list(found.algorithms),
        "workloads": list(found.workloads),
        "time_to_target": [["inf" if t == INF else t for t in row] for row in times.tolist()],
        "tau": tau.tolist(),
        "profile": performance_profile(times, tau).tolist(),
        "score": profile_score(times, params["max_tau"], params["num_points"]).tolist(),
    }


def plain(values: Any) -> list[float]:
    """A list of numbers, some of which a golden file may write as words."""
    return [float(value) for value in values]


def random_times(seed: int, algorithms: int = 4, workloads: int = 7) -> np.ndarray:
    """Times within a factor of 30, a fifth of them missed."""
    rng = np.random.default_rng(seed)
    times = np.exp(rng.uniform(0, math.log(30), (algorithms, workloads)))
    return np.where(rng.random(times.shape) < 0.2, INF, times)


# times


@pytest.mark.parametrize(
    ("metric", "target", "mode", "expected"),
    [
        ([0.9, 0.5, 0.6, 0.4], 0.5, "min", 20.0),  # the first success counts, and reaching is enough
        ([0.9, 0.5, 0.6, 0.4], 0.45, "min", 40.0),
        ([0.9, 0.5, 0.6, 0.4], 0.3, "min", INF),
        ([0.1, 0.7, 0.8, 0.6], 0.8, "max", 30.0),
        ([0.1, 0.7, 0.8, 0.6], 0.81, "max", INF),
        ([NAN, NAN, 0.8, NAN], 0.5, "max", 30.0),
        ([NAN] * 4, 0.5, "min", INF),
        ([-INF, 0.0, 0.0, 0.0], 0.5, "min", 10.0),
    ],
)
def test_time_to_target(metric: list[float], target: float, mode: Any, expected: float) -> None:
    assert time_to_target([10, 20, 30, 40], metric, target, mode) == expected


def test_time_to_target_without_evaluations_or_clock() -> None:
    assert time_to_target([], [], 0.5) == INF
    assert time_to_target([10.0, NAN], [0.9, 0.4], 0.5) == INF
    assert time_to_target([0.0], [0.4], 0.5) == 0.0


@pytest.mark.bare
def test_time_to_target_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        time_to_target([1, 2], [0.5], 0.5)
    with pytest.raises(ValueError, match="never fall"):
        time_to_target([2, 1], [0.5, 0.5], 0.5)
    with pytest.raises(ValueError, match="at least 0"):
        time_to_target([-1, 1], [0.5, 0.5], 0.5)
    with pytest.raises(ValueError, match="got nan"):
        time_to_target([1], [0.5], NAN)
    with pytest.raises(ValueError, match="'min' or 'max', got 'best'"):
        time_to_target([1], [0.5], 0.5, "best")
    with pytest.raises(ValueError, match=r"shape \(E\), got \(1, 1\)"):
        time_to_target([[1]], [[0.5]], 0.5)
    with pytest.raises(TypeError, match="metric must hold numbers"):
        time_to_target([1], ["good"], 0.5)


def test_study_time_is_the_median_of_the_fastest_trials() -> None:
    assert study_time([[5, 3], [9, INF], [INF, 4]]) == 4.0
    assert study_time([[5.0], [INF], [INF]]) == INF
    assert study_time([[5.0], [7.0]]) == 6.0
    assert study_time([[5.0], [INF]]) == INF  # the mean of the middle two
    assert study_time([[INF], [INF]]) == INF
    assert study_time([[NAN, 3.0], [NAN, NAN], [2.0, 8.0]]) == 3.0


def test_order_of_studies_and_trials_does_not_matter() -> None:
    times = random_times(0, 5, 5)
    rng = np.random.default_rng(1)
    shuffled = rng.permuted(times, axis=1)[rng.permutation(5)]
    assert study_time(shuffled) == study_time(times)


def record(algorithm: str, workload: str, study: int, trial: int, time: float) -> dict[str, Any]:
    return {
        "algorithm": algorithm,
        "workload": workload,
        "study": study,
        "trial": trial,
        "time": [time / 2, time],
        "metric": [0.1, 0.9],
    }


RUNS = [
    record(algorithm, workload, study, trial, float(10 * (i + 1) + 100 * j + study + 5 * trial))
    for i, algorithm in enumerate(("sgd", "adam"))
    for j, workload in enumerate(("digits", "wine"))
    for study in range(3)
    for trial in range(2)
]
TARGETS: dict[str, Any] = {"wine": (0.9, "max"), "digits": (0.9, "max")}


def test_study_times_of_records_and_of_a_data_frame() -> None:
    # the fastest of two trials is trial 0: 10 or 20, plus 100 on wine, plus the study's number
    expected = [[[110, 111, 112], [10, 11, 12]], [[120, 121, 122], [20, 21, 22]]]
    for runs in (RUNS, iter(RUNS), pl.DataFrame(RUNS)):
        found = study_times(runs, TARGETS)
        assert found.algorithms == ("sgd", "adam")
        assert found.workloads == ("wine", "digits")  # the order of the targets
        assert found.times.tolist() == expected


def test_study_times_takes_misses_and_leaves_other_workloads_out() -> None:
    missed = [{**run, "time": [], "metric": []} if run["algorithm"] == "adam" else run for run in RUNS]
    found = study_times(missed, {"digits": (0.9, "max")})
    assert found.workloads == ("digits",)
    assert found.times.tolist() == [[[10, 11, 12]], [[INF] * 3]]
    found = study_times(RUNS, {"digits": (0.95, "max")})
    assert np.isinf(found.times).all()


def test_study_times_wants_the_same_budget_everywhere() -> None:
    with pytest.raises(ValueError, match="no run of adam on wine"):
        study_times([run for run in RUNS if (run["algorithm"], run["workload"]) != ("adam", "wine")], TARGETS)
    with pytest.raises(ValueError, match="no run of sgd on moons; adam on moons"):
        study_times(RUNS, {**TARGETS, "moons": (0.5, "max")})
    last = record("adam", "digits", 2, 1, 27.0)
    assert last in RUNS
    with pytest.raises(ValueError, match=r"got \[2, 2, 2\] of sgd on wine and \[2, 2, 1\] of adam on digits"):
        study_times([run for run in RUNS if run != last], TARGETS)
    with pytest.raises(ValueError, match=r"and \[2, 2\] of adam on wine"):
        study_times([r for r in RUNS if (r["algorithm"], r["study"]) != ("adam", 1)], TARGETS)
    with pytest.raises(ValueError, match=r"\[1, 2, 2\] of sgd on wine"):  # alike, but not within a study
        study_times([r for r in RUNS if (r["study"], r["trial"]) != (0, 1)], TARGETS)
    with pytest.raises(ValueError, match="trial 1 of sgd on digits, study 0 twice"):
        study_times([*RUNS, RUNS[1]], TARGETS)


def test_study_times_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="lack study, metric"):
        study_times(pl.DataFrame(RUNS).drop("study", "metric"), TARGETS)
    with pytest.raises(ValueError, match="at least one workload"):
        study_times(RUNS, {})
    with pytest.raises(ValueError, match="a trial of moons, got none"):
        study_times(RUNS, {"moons": (0.5, "max")})
    with pytest.raises(ValueError, match="trial 0 of sgd on digits, study 0: time must be"):
        study_times([{**RUNS[0], "time": [2.0, 1.0]}], {"digits": (0.9, "max")})


# ratios, profiles, scores


def test_ratios_with_ties_misses_and_zeros() -> None:
    times = [
        [10.0, 10.0, INF, 0.0, 0.0, NAN, 5.0],
        [10.0, 25.0, INF, 0.0, 3.0, 8.0, INF],
    ]
    expected = [
        [1.0, 1.0, INF, 1.0, 1.0, INF, 1.0],
        [1.0, 2.5, INF, 1.0, INF, 1.0, INF],
    ]
    assert performance_ratios(times).tolist() == expected
    # a workload that nobody solves stays in the denominator
    assert performance_profile(times, [1.0, 2.5, INF]).tolist() == [[5 / 7] * 3, [3 / 7, 4 / 7, 4 / 7]]


def test_one_submission_scores_the_share_it_reaches() -> None:
    assert profile_score([[5.0, 100.0, 7.0]]).tolist() == [1.0]
    assert profile_score([[5.0, INF, 7.0, NAN]]).tolist() == [0.5]
    assert profile_score([[INF, INF]]).tolist() == [0.0]


def test_scores_by_hand() -> None:
    # ratios 2.5 everywhere: (4 - 2.5) / 3; 4 and more: nothing
    times = [[10.0, 20.0], [25.0, 50.0], [40.0, 80.0], [41.0, INF]]
    assert profile_score(times).tolist() == [1.0, 0.5, 0.0, 0.0]
    # r_max = 6 gives (6 - 2.5) / 5, (6 - 4) / 5 and half of (6 - 4.1) / 5
    assert profile_score(times, r_max=6.0) == pytest.approx([1.0, 0.7, 0.4, 0.19], rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_score_is_the_integral_of_the_profile(seed: int) -> None:
    times = random_times(seed)
    ratios = performance_ratios(times)
    for i, score in enumerate(profile_score(times)):
        steps = sorted({float(r) for r in ratios[i] if r < 4})
        area, _ = integrate.quad(lambda tau, i=i: performance_profile(times, [tau])[i, 0], 1, 4, points=steps)
        assert score == pytest.approx(area / 3, abs=1e-9)
    # the trapezoid rule is off by at most half a step for each of the workloads' jumps
    for points in (100, 3001):
        assert profile_score(times, num_points=points) == pytest.approx(
            profile_score(times), abs=0.5 / (points - 1) + 1e-12
        )


def test_points_are_those_of_the_trapezoid_rule() -> None:
    times = random_times(7)
    tau = np.linspace(1, 4, 100)
    expected = integrate.trapezoid(performance_profile(times, tau), tau, axis=1) / 3
    assert profile_score(times, num_points=100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_invariances_of_the_profile(seed: int) -> None:
    times = random_times(seed)
    rng = np.random.default_rng(seed)
    tau = np.sort(rng.uniform(0.5, 6, 50))
    profile, score = performance_profile(times, tau), profile_score(times)
    assert (np.diff(profile, axis=1) >= 0).all()
    assert (profile[:, tau < 1] == 0).all()
    assert ((score >= 0) & (score <= 1)).all()
    # another unit of time on each workload; powers of two keep ratios exact
    units = 2.0 ** rng.integers(-5, 6, times.shape[1])
    assert (performance_profile(times * units, tau) == profile).all()
    workloads, algorithms = rng.permutation(times.shape[1]), rng.permutation(len(times))
    assert profile_score(times[:, workloads]) == pytest.approx(score, rel=1e-12)
    assert (profile_score(times[algorithms]) == score[algorithms]).all()
    # one more, faster by half everywhere, takes scores away from everybody
    assert (profile_score(np.vstack([times, times.min(0) / 2]))[:-1] <= score).all()


def test_the_order_of_two_may_depend_on_a_third() -> None:
    """Which is why pairwise speed-ups are to be reported beside the score."""
    first, second, third = [1.0, 2.5], [3.0, 1.0], [0.25, INF]
    assert profile_score([first, second]) == pytest.approx([(1 + 1.5 / 3) / 2, (1 / 3 + 1) / 2])
    # the third is so much faster on the first workload that nobody else gains anything there
    assert profile_score([first, second, third]) == pytest.approx([0.5 / 2, 1 / 2, 1 / 2])
    speedups = pairwise_speedups([first, second, third], max_time=9.0)
    assert speedups[0, 1] == pytest.approx(pairwise_speedups([first, second])[0, 1])


@pytest.mark.bare
def test_profiles_say_what_is_wrong() -> None:
    for function in (performance_ratios, profile_score, pairwise_speedups):
        with pytest.raises(ValueError, match=r"shape \(A, W\), got \(2,\)"):
            function([1.0, 2.0])
        with pytest.raises(ValueError, match=r"must not be empty, got shape \(2, 0\)"):
            function([[], []])
        with pytest.raises(ValueError, match="at least 0, got -1"):
            function([[1.0, -1.0]])
        with pytest.raises(TypeError, match="times must hold numbers"):
            function([["1", "2"]])
        with pytest.raises(ValueError, match="rectangular"):
            function([[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match=r"tau must have shape \(K\)"):
        performance_profile([[1.0]], 2.0)
    for bad in (1.0, INF, NAN):
        with pytest.raises(ValueError, match="r_max must be"):
            profile_score([[1.0]], r_max=bad)
    with pytest.raises(ValueError, match="num_points must be at least 2"):
        profile_score([[1.0]], num_points=1)


# held-out variants


def test_a_missed_variant_costs_its_base() -> None:
    base_of = [None, None, 0, 0]
    times = [
        [10.0, 20.0, 30.0, 40.0],  # reaches all: its base times are kept
        [12.0, 15.0, INF, 50.0],  # misses one variant of workload 0
        [14.0, INF, 33.0, 161.0],  # more than four times slower than the fastest on a variant
        [40.5, 25.0, 30.0, 40.0],  # more than four times slower than the fastest on the base
    ]
    assert apply_variant_rule(times, base_of).tolist() == [[10, 20], [INF, 15], [INF, INF], [INF, 25]]
    # with a larger limit only the real misses count
    assert apply_variant_rule(times, base_of, r_max=10.0).tolist() == [
        [10, 20],
        [INF, 15],
        [14, INF],
        [40.5, 25],
    ]
    assert apply_variant_rule(times, [2, None, None, 2]).tolist() == [
        [20, 30],
        [15, INF],
        [INF, INF],
        [25, INF],
    ]


def test_the_limit_of_the_rule_holds_against_the_fastest_before_it() -> None:
    # the fastest on the base loses it through the variant, and still sets the pace of the others
    times = [[10.0, INF], [39.0, 5.0], [41.0, 5.0]]
    assert apply_variant_rule(times, [None, 0]).tolist() == [[INF], [39.0], [INF]]


def test_without_variants_the_score_is_unchanged() -> None:
    times = random_times(3)
    assert (profile_score(apply_variant_rule(times, [None] * 7)) == profile_score(times)).all()


def test_the_variant_rule_wants_a_base_for_each_variant() -> None:
    with pytest.raises(ValueError, match="each of 2 columns, got 1"):
        apply_variant_rule([[1.0, 2.0]], [None])
    for base in (1, 2, -1):
        with pytest.raises(ValueError, match=f"a base workload, got {base} for 1"):
            apply_variant_rule([[1.0, 2.0]], [None, base])


# speed-ups


def test_speedup_is_the_geometric_mean_of_ratios() -> None:
    rng = np.random.default_rng(0)
    own, other = np.exp(rng.normal(size=(2, 9)))
    assert geometric_speedup(own, other) == pytest.approx(stats.gmean(other / own), rel=1e-12)
    assert geometric_speedup(own, other) * geometric_speedup(other, own) == pytest.approx(1, rel=1e-12)
    assert geometric_speedup(own, own / 3) == pytest.approx(1 / 3, rel=1e-12)


def test_a_miss_counts_as_the_limit_plus_one() -> None:
    own, other = [10.0, INF, NAN], [INF, 50.0, 100.0]
    expected = stats.gmean([100 / 10, 50 / 100, 100 / 100])
    assert geometric_speedup(own, other, max_time=99.0) == pytest.approx(expected, rel=1e-12)
    expected = stats.gmean([100 / 10, 50 / 200, 100 / 300])
    assert geometric_speedup(own, other, max_time=[99.0, 199.0, 299.0]) == pytest.approx(expected, rel=1e-12)


def test_pairwise_speedups_are_those_of_the_pairs() -> None:
    times = random_times(1)
    found = pairwise_speedups(times, max_time=100.0)
    assert found.shape == (4, 4)
    assert found * found.T == pytest.approx(np.ones((4, 4)), rel=1e-12)
    assert found[2, 1] == pytest.approx(geometric_speedup(times[2], times[1], 100.0), rel=1e-12)


@pytest.mark.bare
def test_speedups_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="reference misses 1 of 2 targets: give max_time"):
        geometric_speedup([1.0, 1.0], [1.0, INF])
    for bad in (0.0, -1.0, -INF):
        with pytest.raises(ValueError, match="times must be above 0"):
            geometric_speedup([1.0, bad], [1.0, 1.0], max_time=9.0)
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        geometric_speedup([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite and above 0"):
        geometric_speedup([INF], [1.0], max_time=INF)
    with pytest.raises(ValueError, match="one number or 1, got shape"):
        geometric_speedup([INF], [1.0], max_time=[1.0, 2.0])
    with pytest.raises(ValueError, match="must not be empty"):
        geometric_speedup([], [])


# intervals and tables


def test_the_interval_of_paired_studies_by_enumeration() -> None:
    # two studies of two algorithms: the medians of the four draws give ratios 2, 4 / 3 (twice) and 2 / 3
    times = [[[10.0, 30.0]], [[20.0, 20.0]]]
    found = score_interval(times, paired=True, confidence=0.98, resamples=400)
    # (10, 20): 1 and (4 - 2) / 3; (20, 20): both 1; (30, 20): (4 - 1.5) / 3 and 1
    assert found.score.tolist() == [1.0, 1.0]
    assert found.low == pytest.approx([2.5 / 3, 2 / 3])
    assert found.high.tolist() == [1.0, 1.0]


def test_pairing_removes_what_all_share() -> None:
    rng = np.random.default_rng(0)
    difficulty = 2.0 ** rng.integers(0, 4, size=(1, 3, 8))
    times = np.array([1.0, 1.5])[:, None, None] * difficulty
    paired, own = score_interval(times, paired=True), score_interval(times)
    assert (paired.low == paired.high).all()
    assert paired.score == pytest.approx([1.0, 2.5 / 3])
    assert (own.low < own.high).any()


def test_intervals_are_repeatable_and_contain_the_score() -> None:
    times = np.exp(np.random.default_rng(2).normal(size=(3, 5, 9)))
    first, again = score_interval(times, seed=1), score_interval(times, seed=1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert ((first.low <= first.score) & (first.score <= first.high)).all()
    assert (first.score == profile_score(np.median(times, axis=2))).all()
    wider = score_interval(times, seed=1, confidence=0.99)
    assert ((wider.low <= first.low) & (first.high <= wider.high)).all()
    one = score_interval(times[..., :1])
    assert (one.low == one.score).all()
    assert (one.high == one.score).all()


def test_interval_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"shape \(A, W, S\), got \(1, 1\)"):
        score_interval([[1.0]])
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        score_interval([[[1.0]]], resamples=0)
    with pytest.raises(ValueError, match="confidence must lie in"):
        score_interval([[[1.0]]], confidence=1.0)


def test_the_profile_table_draws_the_profile() -> None:
    times = random_times(5)
    names = ["a", "b", "c", "d"]
    table = profile_table(times, names)
    assert table.columns == ["name", "tau", "share"]
    assert table["name"].unique(maintain_order=True).to_list() == names
    for i, name in enumerate(names):
        tau, share = (table.filter(pl.col("name") == name)[column].to_numpy() for column in ("tau", "share"))
        assert tau[0] == 1
        assert tau[-1] == 4
        assert (np.diff(tau) > 0).all()
        assert (share == performance_profile(times, tau)[i]).all()
        # the area under its steps is the score: nothing happens between them
        assert (share[:-1] * np.diff(tau)).sum() / 3 == pytest.approx(profile_score(times)[i], rel=1e-12)
    with pytest.raises(ValueError, match="4 different names"):
        profile_table(times, ["a", "b", "c", "c"])


def test_the_score_table_is_ordered_by_score() -> None:
    times = np.array([[[40.0], [INF], [10.0]], [[10.0], [10.0], [10.0]], [[25.0], [INF], [INF]]])
    table = score_table(times, ["adam", "sgd", "rmsprop"])
    assert table["name"].to_list() == ["sgd", "adam", "rmsprop"]
    assert table["score"].to_list() == pytest.approx([1.0, 1 / 3, 0.5 / 3])
    assert table["fastest"].to_list() == pytest.approx([1.0, 1 / 3, 0.0])  # a tie counts for both
    assert table["reached"].to_list() == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert table.columns == ["name", "score", "low", "high", "fastest", "reached"]
    with pytest.raises(ValueError, match="3 different names"):
        score_table(times, ["a", "b"])
