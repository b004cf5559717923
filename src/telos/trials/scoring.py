"""Who is fastest to a fixed result: times to a target, performance profiles and their score.

A time is whatever each contestant spends to reach the same result: optimizer steps, seconds, or, for a table
of recipes by data sets, an error (1 - accuracy). It is not negative, less is better, and infinity or NaN says
that the target was missed. Contestants are called algorithms here and data sets workloads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import polars as pl

Mode: TypeAlias = Literal["min", "max"]
Floats: TypeAlias = NDArray[np.float64]

COLUMNS = ("algorithm", "workload", "study", "trial", "time", "metric")


class StudyTimes(NamedTuple):
    """The time of every study; see :func:`study_times`.

    Attributes:
        algorithms: A names.
        workloads: W names.
        times: (A, W, S), the fastest trial of each study; ``inf`` where none reached the target.
    """

    algorithms: tuple[str, ...]
    workloads: tuple[str, ...]
    times: Floats


class ScoreInterval(NamedTuple):
    """Scores (A,) and the ends (A,) of their bootstrap intervals; see :func:`score_interval`."""

    score: Floats
    low: Floats
    high: Floats


def time_to_target(time: ArrayLike, metric: ArrayLike, target: float, mode: Mode = "min") -> float:
    """The time of the first evaluation that reaches the target.

    Args:
        time: (E,) time spent before each evaluation, never falling.
        metric: (E,) what the evaluation gave; NaN reaches nothing.
        target: what has to be reached.
        mode: ``"min"`` where ``metric <= target`` is a success, ``"max"`` where ``metric >= target`` is.

    Returns:
        The time, ``inf`` if the target is never reached or if the time is NaN.

    Raises:
        ValueError: for other shapes, a falling or negative time, a target that is NaN, or another mode.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> time_to_target([10, 20, 30], [0.7, 0.4, 0.5], target=0.5)
        20.0
        >>> time_to_target([10, 20, 30], [0.7, 0.4, 0.5], target=0.9, mode="max")
        inf
    """
    moments, values = _numbers("time", time, ("E",)), _numbers("metric", metric, ("E",))
    if moments.shape != values.shape:
        raise ValueError(f"time and metric must have one length, got {len(moments)} and {len(values)}")
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    if math.isnan(target):
        raise ValueError("target must be a number, got nan")
    known = moments[~np.isnan(moments)]
    if (known < 0).any() or (np.diff(known) < 0).any():
        raise ValueError("time must be at least 0 and never fall: it is what was spent up to each evaluation")
    reached = np.flatnonzero(values <= target if mode == "min" else values >= target)
    if not len(reached):
        return math.inf
    first = float(moments[reached[0]])
    return math.inf if math.isnan(first) else first


def study_time(times: ArrayLike) -> float:
    """The time of an algorithm on a workload: the median over studies of the fastest trial.

    ::

        t = median_study  min_trial  t[study, trial]

    Args:
        times: (S, T) times to the target of S studies with T trials; infinity or NaN for a miss.

    Returns:
        The time. With an even number of studies the middle two are averaged, so one miss of two is a miss.

    Raises:
        ValueError: for another shape, no study, no trial, or a negative time.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> study_time([[50, 30], [40, float("inf")], [90, 80]])
        40.0
    """
    return float(np.median(_times(times, ("S", "T")).min(1)))


def study_times(
    runs: pl.DataFrame | Iterable[Mapping[str, Any]], targets: Mapping[str, tuple[float, Mode]]
) -> StudyTimes:
    """The time of the fastest trial of every study, from the records of all trials.

    Args:
        runs: one row for each trial: ``algorithm``, ``workload``, ``study``, ``trial``, and the lists ``time``
            and ``metric`` of its evaluations (which may be empty). Other columns do not matter.
        targets: value and mode of each workload's target; its order is the order of the result. Rows of other
            workloads are left out.

    Returns:
        Algorithms in order of appearance, workloads, and their (A, W, S) times; ``np.median(times, 2)`` is
        what the scores below want.

    Raises:
        ValueError: for a missing column, where an algorithm has no run on a workload, where a trial occurs
            twice, and where the numbers of studies or trials differ: then the algorithms did not have the
            same tuning budget.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> run = {"workload": "digits", "study": 0, "trial": 0, "time": [10, 20], "metric": [0.8, 0.9]}
        >>> found = study_times(
        ...     [{"algorithm": "sgd", **run}, {"algorithm": "adam", **run, "metric": [0.9, 0.95]}],
        ...     targets={"digits": (0.9, "max")},
        ... )
        >>> found.algorithms, found.times[:, 0, 0].tolist()
        (('sgd', 'adam'), [20.0, 10.0])
    """
    # what has iter_rows is a data frame; polars itself need not be there
    rows = runs.iter_rows(named=True) if hasattr(runs, "iter_rows") else runs
    if not targets:
        raise ValueError("targets must name at least one workload, got none")
    found: dict[tuple[str, str], dict[Any, dict[Any, float]]] = {}
    for row in rows:
        if lacking := [name for name in COLUMNS if name not in row]:
            raise ValueError(
                f"runs must have the columns {', '.join(COLUMNS)}, and lack {', '.join(lacking)}"
            )
        workload = row["workload"]
        if workload not in targets:
            continue
        trials = found.setdefault((row["algorithm"], workload), {}).setdefault(row["study"], {})
        where = f"{row['algorithm']} on {workload}, study {row['study']}"
        if row["trial"] in trials:
            raise ValueError(f"runs must hold every trial once, got trial {row['trial']} of {where} twice")
        try:
            trials[row["trial"]] = time_to_target(row["time"], row["metric"], *targets[workload])
        except ValueError as error:
            raise ValueError(f"trial {row['trial']} of {where}: {error}") from error
    algorithms = tuple(dict.fromkeys(algorithm for algorithm, _ in found))
    if not algorithms:
        raise ValueError(f"runs must hold a trial of {', '.join(targets)}, got none")
    absent = [f"{a} on {w}" for a in algorithms for w in targets if (a, w) not in found]
    if absent:
        raise ValueError(f"every algorithm must run on every workload, got no run of {'; '.join(absent)}")
    sizes = {(a, w): [len(trials) for trials in found[a, w].values()] for a in algorithms for w in targets}
    first, size = next(iter(sizes.items()))
    for (algorithm, workload), other in sizes.items():
        if other != [size[0]] * len(size):
            raise ValueError(
                "every algorithm must have the same number of trials in the same number of studies, got "
                f"{size} of {' on '.join(first)} and {other} of {algorithm} on {workload}"
            )
    times = [
        [[min(trials.values()) for _, trials in sorted(found[a, w].items())] for w in targets]
        for a in algorithms
    ]
    return StudyTimes(algorithms, tuple(targets), np.array(times, dtype=np.float64))


def performance_ratios(times: ArrayLike) -> Floats:
    """How many times longer than the fastest each algorithm took.

    ::

        r[a, w] = t[a, w] / min_a' t[a', w]

    Args:
        times: (A, W), at least 0; infinity or NaN where the target was missed.

    Returns:
        (A, W) ratios of at least 1: 1 for all that tie for the fastest (a time of 0 included), ``inf`` for a
        miss, also where everyone missed.

    Raises:
        ValueError: for another shape, no algorithm, no workload, or a negative time.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> performance_ratios([[10.0, 60.0], [20.0, float("inf")]])
        array([[ 1.,  1.],
               [ 2., inf]])
    """
    return _ratios(_times(times, ("A", "W")))


def performance_profile(times: ArrayLike, tau: ArrayLike) -> Floats:
    """The share of workloads that an algorithm solves within ``tau`` times the fastest time.

    ::

        rho_a(tau) = #{w : r[a, w] <= tau} / W

    Args:
        times: (A, W), at least 0; infinity or NaN where the target was missed.
        tau: (K,) ratios.

    Returns:
        (A, K) shares, rising with ``tau``. A workload that everyone missed counts in the denominator.

    Raises:
        ValueError: for another shape, no algorithm, no workload, or a negative time.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> performance_profile([[10.0, 60.0], [20.0, float("inf")]], tau=[1.0, 2.0, 4.0])
        array([[1. , 1. , 1. ],
               [0. , 0.5, 0.5]])
    """
    ratios = _ratios(_times(times, ("A", "W")))
    limits = _numbers("tau", tau, ("K",))
    # a miss is a miss at every tau, an infinite one too
    within = (ratios[:, :, None] <= limits) & np.isfinite(ratios)[:, :, None]
    return within.mean(1)


def profile_score(times: ArrayLike, r_max: float = 4.0, num_points: int | None = None) -> Floats:
    """The benchmark score: the area under the performance profile, normalised to [0, 1].

    ::

        B_a = 1 / (r_max - 1) * int_1^r_max rho_a(tau) dtau
            = 1 / W * sum_w max(0, r_max - r[a, w]) / (r_max - 1)

    An algorithm that is fastest everywhere scores 1; a ratio of ``r_max`` or more is worth as little as a
    miss. The score depends on who else takes part, and so may the order of two algorithms: report
    :func:`pairwise_speedups` beside it.

    Args:
        times: (A, W), at least 0; infinity or NaN where the target was missed.
        r_max: the largest ratio that still counts, above 1.
        num_points: number of points of the trapezoid rule, 100 in the official code; by default the exact
            integral.

    Returns:
        (A,) scores.

    Raises:
        ValueError: for another shape, no algorithm, no workload, a negative time, ``r_max`` that is not a
            finite number above 1, or ``num_points`` below 2.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> profile_score([[10.0, 60.0], [25.0, float("inf")]])
        array([1.  , 0.25])
    """
    found = _times(times, ("A", "W"))
    _check_r_max(r_max)
    if num_points is None:
        return _score(found, r_max)
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}")
    profile = performance_profile(found, np.linspace(1.0, r_max, num_points))
    return (profile[:, 1:] + profile[:, :-1]).mean(1) / 2


def score_interval(
    times: ArrayLike,
    r_max: float = 4.0,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    paired: bool = False,
    seed: int = 0,
) -> ScoreInterval:
    """The score of the median times, with a bootstrap interval over studies.

    Studies are drawn with replacement, the medians and all scores computed anew; the interval lies between
    the percentiles. A handful of studies gives a rough interval, and it says nothing about other workloads.

    Args:
        times: (A, W, S) times of S studies, at least 0; infinity or NaN where the target was missed.
        r_max: the largest ratio that still counts, above 1.
        resamples: how often to draw.
        confidence: of the interval.
        paired: draw the same studies for every algorithm and workload, for seeds that all of them share; else
            each draws its own.
        seed: of the draws.

    Returns:
        Scores and the ends of their intervals, (A,) each.

    Raises:
        ValueError: for another shape, an empty dimension, a negative time, ``r_max`` that is not a finite
            number above 1, no resample, or a confidence outside (0, 1).
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179, for the score; the interval is
        telos's own.

    Example:
        >>> times = [[[10.0, 12.0, 11.0]], [[20.0, 30.0, 25.0]]]  # two algorithms, one workload, three studies
        >>> found = score_interval(times)
        >>> found.score.round(2).tolist(), found.low.round(2).tolist(), found.high.round(2).tolist()
        ([1.0, 0.58], [1.0, 0.33], [1.0, 0.78])
    """
    found = _times(times, ("A", "W", "S"))
    _check_r_max(r_max)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    generator, studies = np.random.default_rng(seed), found.shape[2]
    scores = np.empty((resamples, len(found)))
    for row in scores:
        if paired:
            drawn = found[:, :, generator.integers(studies, size=studies)]
        else:
            drawn = np.take_along_axis(found, generator.integers(studies, size=found.shape), axis=2)
        row[:] = _score(np.median(drawn, axis=2), r_max)
    low, high = np.quantile(scores, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return ScoreInterval(_score(np.median(found, axis=2), r_max), low, high)


def apply_variant_rule(times: ArrayLike, base_of: Sequence[int | None], r_max: float = 4.0) -> Floats:
    """Times on the base workloads, kept only where the held-out variants are reached too.

    Tuning for the known workloads alone does not pay: an algorithm that is slower than ``r_max`` times the
    fastest on a variant, or misses its target, loses the base workload; else its own base time is kept.

    Args:
        times: (A, W) on base workloads and variants, at least 0; infinity or NaN for a miss.
        base_of: for each of the W columns the column of its base workload, or ``None`` for a base workload.
        r_max: slower than this times the fastest is a miss, on bases and variants.

    Returns:
        (A, B) times on the base workloads, in the order of their columns.

    Raises:
        ValueError: for another shape, a negative time, ``r_max`` that is not a finite number above 1, or a
            ``base_of`` that does not name a base for each variant.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> times = [[10.0, 30.0, 60.0], [20.0, float("inf"), 50.0]]
        >>> apply_variant_rule(times, base_of=[None, 0, None])
        array([[10., 60.],
               [inf, 50.]])
    """
    found = _times(times, ("A", "W"))
    _check_r_max(r_max)
    if len(base_of) != found.shape[1]:
        raise ValueError(
            f"base_of must have an entry for each of {found.shape[1]} columns, got {len(base_of)}"
        )
    bases = [column for column, base in enumerate(base_of) if base is None]
    for column, base in enumerate(base_of):
        if base is not None and base not in bases:
            raise ValueError(f"base_of must give the column of a base workload, got {base} for {column}")
    # relative to the fastest before any variant takes times away, as the official code has it
    missed = ~(_ratios(found) <= r_max)
    lost = missed.copy()
    for column, base in enumerate(base_of):
        if base is not None:
            lost[:, base] |= missed[:, column]
    return np.where(lost, np.inf, found)[:, bases]


def geometric_speedup(times: ArrayLike, reference: ArrayLike, max_time: ArrayLike | None = None) -> float:
    """How many times faster than a reference, in the geometric mean over workloads.

    ::

        exp( 1 / W * sum_w log(reference[w] / times[w]) )

    It does not depend on any third algorithm, and exchanging the two inverts it.

    Args:
        times: (W,), above 0; infinity or NaN where the target was missed.
        reference: (W,), the same of the reference.
        max_time: the time limit, one for all or one for each workload; a miss counts as the limit plus 1.

    Returns:
        The speed-up: 2 says twice as fast. (The official script prints the inverse.)

    Raises:
        ValueError: for other shapes, a time or limit that is not above 0, or a miss without ``max_time``.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> round(geometric_speedup([10.0, 40.0], [40.0, 40.0]), 6)
        2.0
        >>> round(geometric_speedup([10.0, float("inf")], [10.0, 101.0], max_time=1615.0), 6)
        0.25
    """
    own, other = _filled("times", times, max_time), _filled("reference", reference, max_time)
    if own.shape != other.shape:
        raise ValueError(f"times and reference must have one length, got {len(own)} and {len(other)}")
    return float(np.exp(np.mean(np.log(other) - np.log(own))))


def pairwise_speedups(times: ArrayLike, max_time: ArrayLike | None = None) -> Floats:
    """The geometric speed-up of every algorithm over every other.

    Args:
        times: (A, W), above 0; infinity or NaN where the target was missed.
        max_time: see :func:`geometric_speedup`.

    Returns:
        (A, A): entry (i, j) is the speed-up of i over j, the inverse of entry (j, i).

    Raises:
        ValueError: for another shape, no algorithm, no workload, a time or limit that is not above 0, or a
            miss without ``max_time``.
        TypeError: for what are not numbers.

    Source:
        Benchmarking Neural Network Training Algorithms, arXiv 2306.07179.

    Example:
        >>> pairwise_speedups([[10.0, 10.0], [40.0, 10.0]]).round(6)
        array([[1. , 2. ],
               [0.5, 1. ]])
    """
    found = _times(times, ("A", "W"))
    return np.array([[geometric_speedup(own, other, max_time) for other in found] for own in found])


def profile_table(times: ArrayLike, names: Sequence[str], r_max: float = 4.0) -> pl.DataFrame:
    """Performance profiles as a tidy table, with a row for every step of the curves.

    Args:
        times: (A, W), at least 0; infinity or NaN where the target was missed.
        names: A names.
        r_max: the largest ratio shown, above 1.

    Returns:
        Columns ``name``, ``tau`` and ``share``. All names have the same ``tau``: 1, every ratio that occurs up
        to ``r_max``, and ``r_max``. Draw steps that hold until the next ``tau`` (``hv`` in plotly).

    Raises:
        ValueError: for another shape, no algorithm, no workload, a negative time, names that do not fit, or
            ``r_max`` that is not a finite number above 1.
        TypeError: for what are not numbers.

    Example:
        >>> profile_table([[10.0, 60.0], [20.0, float("inf")]], ["sgd", "adam"]).rows()
        [('sgd', 1.0, 1.0), ('sgd', 2.0, 1.0), ('sgd', 4.0, 1.0),
         ('adam', 1.0, 0.0), ('adam', 2.0, 0.5), ('adam', 4.0, 0.5)]
    """
    import polars as pl

    found = _times(times, ("A", "W"))
    _check_r_max(r_max)
    _check_names(names, len(found))
    ratios = _ratios(found)
    tau = np.unique(np.append(ratios[ratios <= r_max], [1.0, r_max]))
    profile = performance_profile(found, tau)
    return pl.DataFrame(
        {
            "name": np.repeat(np.array(names, dtype=object), len(tau)).tolist(),
            "tau": np.tile(tau, len(names)),
            "share": profile.ravel(),
        }
    )


def score_table(
    times: ArrayLike, names: Sequence[str], r_max: float = 4.0, *, paired: bool = False, seed: int = 0
) -> pl.DataFrame:
    """The leaderboard of a benchmark: scores with their intervals, best first.

    Args:
        times: (A, W, S) times of S studies, at least 0; infinity or NaN where the target was missed.
        names: A names.
        r_max: the largest ratio that still counts, above 1.
        paired: whether the algorithms share their studies' seeds; see :func:`score_interval`.
        seed: of the bootstrap.

    Returns:
        Columns ``name``, ``score`` with ``low`` and ``high``, ``fastest`` (share of the workloads on which no
        other was faster) and ``reached`` (share of the workloads whose target the median study reached).

    Raises:
        ValueError: for another shape, an empty dimension, a negative time, names that do not fit, or
            ``r_max`` that is not a finite number above 1.
        TypeError: for what are not numbers.

    Example:
        >>> times = [[[20.0], [float("inf")]], [[10.0], [60.0]]]  # one study
        >>> score_table(times, ["adam", "sgd"]).select("name", "fastest", "reached").rows()
        [('sgd', 1.0, 1.0), ('adam', 0.0, 0.5)]
    """
    import polars as pl

    found = _times(times, ("A", "W", "S"))
    _check_names(names, len(found))
    interval = score_interval(found, r_max, paired=paired, seed=seed)
    ratios = _ratios(np.median(found, axis=2))
    return pl.DataFrame(
        {
            "name": list(names),
            **interval._asdict(),
            "fastest": (ratios == 1).mean(1),
            "reached": np.isfinite(ratios).mean(1),
        }
    ).sort("score", descending=True, maintain_order=True)


def _ratios(times: Floats) -> Floats:
    fastest = times.min(0)
    ratios = np.full_like(times, np.inf)
    np.divide(times, fastest, out=ratios, where=np.isfinite(times) & (fastest > 0))
    # 0 / 0 among them
    ratios[np.isfinite(times) & (times == fastest)] = 1.0
    return ratios


def _score(times: Floats, r_max: float) -> Floats:
    return np.maximum(0.0, r_max - _ratios(times)).mean(1) / (r_max - 1)


def _numbers(name: str, values: ArrayLike, dimensions: tuple[str, ...]) -> Floats:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular table of numbers: {error}") from error
    if not array.size and array.ndim == len(dimensions):
        return np.zeros(array.shape)  # an empty list has no dtype to check
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold numbers, got {array.dtype}")
    if array.ndim != len(dimensions):
        raise ValueError(f"{name} must have shape ({', '.join(dimensions)}), got {array.shape}")
    return array.astype(np.float64)


def _times(values: ArrayLike, dimensions: tuple[str, ...]) -> Floats:
    """Times with every miss written as infinity."""
    times = _numbers("times", values, dimensions)
    if not times.size:
        raise ValueError(f"times must not be empty, got shape {times.shape}")
    if (times < 0).any():
        raise ValueError(f"times must be at least 0, got {np.nanmin(times):g}")
    return np.where(np.isnan(times), np.inf, times)


def _filled(name: str, values: ArrayLike, max_time: ArrayLike | None) -> Floats:
    """Positive times with every miss replaced by the limit plus 1."""
    times = _numbers(name, values, ("W",))
    if not times.size:
        raise ValueError(f"{name} must not be empty")
    if (times <= 0).any():
        raise ValueError(f"{name} must be above 0 for a ratio to exist, got {np.nanmin(times):g}")
    missed = ~np.isfinite(times)
    if missed.any():
        if max_time is None:
            raise ValueError(f"{name} misses {int(missed.sum())} of {len(times)} targets: give max_time")
        limit = np.asarray(max_time, dtype=np.float64)
        if limit.shape not in ((), times.shape):
            raise ValueError(f"max_time must be one number or {len(times)}, got shape {limit.shape}")
        if not (np.isfinite(limit) & (limit > 0)).all():
            raise ValueError(f"max_time must be finite and above 0, got {max_time}")
        times = np.where(missed, limit + 1, times)
    return times


def _check_r_max(r_max: float) -> None:
    if not 1 < r_max < math.inf:
        raise ValueError(f"r_max must be a finite number above 1, got {r_max}")


def _check_names(names: Sequence[str], count: int) -> None:
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"names must be {count} different names, got {list(names)}")
