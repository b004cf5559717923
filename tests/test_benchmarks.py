"""The benchmarks' own arithmetic, and that what README and docs say about speed is what was measured."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import _rounds
from benchmarks.linear_loss import goals_of, row_losses

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
SPREAD = {"median", "low", "high"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("benchmarks_table")


def test_the_order_rotates_from_round_to_round() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = _rounds.interleaved(contenders, rounds=3, warmup=1)
    assert ["".join(calls[start : start + 3]) for start in (0, 3, 6, 9)] == ["abc", "bca", "cab", "abc"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_seconds_are_those_of_the_call() -> None:
    times = _rounds.interleaved({"quick": lambda: None, "slow": lambda: time.sleep(0.02)}, rounds=1, warmup=0)
    assert times["slow"][0] >= 0.02 > times["quick"][0] >= 0


def test_a_ratio_is_taken_within_each_round_against_the_best_reference() -> None:
    times = {"own": [2.0, 6.0, 9.0], "a": [1.0, 4.0, 9.0], "b": [4.0, 3.0, 3.0]}
    # 2 / 1, 6 / 3, 9 / 3
    assert _rounds.ratio(times, "own", "a", "b") == {"median": 2.0, "low": 2.0, "high": 2.5}
    assert _rounds.ratio(times, "own", "a") == {"median": 1.5, "low": 1.25, "high": 1.75}
    assert _rounds.spread([5.0]) == {"median": 5.0, "low": 5.0, "high": 5.0}


def test_goals() -> None:
    reached = {"median": 1.2, "low": 1.0, "high": 1.4}
    assert _rounds.goal("g", reached, at_most=1.3)["met"] is True
    assert _rounds.goal("g", reached, at_most=1.1)["met"] is False
    assert _rounds.goal("g", reached, at_least=1.1)["met"] is True
    with pytest.raises(ValueError, match="either at_most or at_least"):
        _rounds.goal("g", reached)


def test_the_floor_is_the_longer_of_arithmetic_and_transfers() -> None:
    rates = {"float32_flops_per_second": 100.0, "float64_flops_per_second": 50.0, "bytes_per_second": 10.0}
    assert _rounds.floor_seconds(200, 10, rates) == 2.0
    assert _rounds.floor_seconds(200, 10, rates, "float64") == 4.0
    assert _rounds.floor_seconds(200, 50, rates) == 5.0


def test_counted_memory_is_what_is_alive_together() -> None:
    def action() -> torch.Tensor:
        first = torch.empty(2**20, dtype=torch.float32)  # 4 MiB, gone before the others come
        del first
        second = torch.empty(2**20, dtype=torch.float32, device="meta")
        return second + 1

    assert _rounds.counted_peak(action) == 8.0
    given = torch.ones(2**20)
    assert _rounds.counted_peak(lambda: given.view(2, -1).t().add_(1)) == 0.0
    assert _rounds.counted_peak(lambda: given.t() + 1) == 4.0


def test_what_is_written_reads_back_whole(tmp_path: Path) -> None:
    result = {"cases": [{"case": "x", "seconds": {"a": [0.123456789, 2.0]}, "sizes": {"N": 3}}], "what": "w"}
    path = tmp_path / "new" / "r.json"
    _rounds.write(path, result)
    back = json.loads(path.read_text())
    assert back["cases"][0]["seconds"]["a"] == [0.12346, 2.0]
    assert list(back) == ["cases", "what"]
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]
    with pytest.raises(ValueError, match="JSON"):
        _rounds.write(path, {"what": float("nan")})
    assert json.loads(path.read_text()) == back


def test_a_plot_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    series = {"telos": [(10, 1.0), (100, 20.0)], "floor": [(10, 0.5), (100, 5.0)]}
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        _rounds.plot(file, "title", series, "rows")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_bytes()) < 60_000
    assert "stroke-dasharray" in files[0].read_text()  # the floor


def test_the_series_of_a_plot_are_medians() -> None:
    cases = [
        {
            "sizes": {"N": 2},
            "seconds": {"a": [1.0, 9.0, 2.0]},
            "floor_seconds": 0.5,
            "memory_MiB": {"a": None},
        },
        {"sizes": {"N": 4}, "seconds": {"a": [3.0]}, "memory_MiB": {"a": 7.0}},
    ]
    assert _rounds.curves(cases, "N") == {"a": [(2, 2.0), (4, 3.0)], "floor": [(2, 0.5)]}
    assert _rounds.curves(cases, "N", "memory_MiB") == {"a": [(4, 7.0)]}


def test_quick_runs_never_touch_the_recorded_results() -> None:
    parser = _rounds.parser("triplets.py", "First line.\nMore.", rounds=3, threads=1)
    quick = _rounds.destination("triplets.py", parser.parse_args(["--quick"]))
    assert quick == ROOT / "runs" / "benchmarks" / "triplets.json"
    assert _rounds.destination("triplets.py", parser.parse_args([])).parent == _rounds.RESULTS


def test_memory_is_measured_in_a_fresh_process() -> None:
    # 64 embeddings: a few MiB at most, and in any case not what this process holds
    grown = _rounds.peak_memory(str(ROOT / "benchmarks" / "triplets.py"), "--memory-of", "telos", 64)
    assert grown is not None
    assert 0 <= grown < 200 < _rounds.resident_peak()


def test_every_row_wise_loss_takes_part() -> None:
    import telos.losses

    taken, refused = row_losses(8, 4, 6)
    public = {
        name
        for name in telos.losses.__all__
        if isinstance(kind := getattr(telos.losses, name), type)
        and issubclass(kind, telos.losses.ClassificationLoss)
        and kind is not telos.losses.ClassificationLoss
    }
    assert set(taken) | set(refused) == public
    assert {"CrossEntropyLoss", "FocalLoss", "ZLoss", "ALDRKLLoss"} <= set(taken)
    assert "adversarial_logits" in refused["SmoothAdversarialCompSumLoss"]


def test_the_slowest_loss_decides_about_the_goal() -> None:
    def of(**ratios: float) -> dict[str, object]:
        return {"ratios": {name: _rounds.spread([value]) for name, value in ratios.items()}}

    own, others, counted = of(own=1.1), of(fast=1.0, slow=1.4), of(small=0.1, large=0.12)
    goals = goals_of(own, others, counted)
    assert [(entry["reached"]["median"], entry["met"]) for entry in goals] == [
        (1.1, False),
        (1.4, False),
        (0.12, True),
    ]
    assert goals[1]["name"].endswith("slowest of 2 others: slow")


def test_an_unknown_benchmark_is_refused() -> None:
    call = [sys.executable, "-m", "benchmarks", "triplet"]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "there is no benchmark triplet; there are " in ended.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_recorded_results_have_the_layout(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem in benchmarks.NAMES
    assert {"what", "command", "machine", "goals", "cases"} <= set(result)
    assert result["command"] == f"python -m benchmarks.{path.stem}"
    assert {"processor", "cores", "threads", "load_average", "torch", "python", "peers"} <= set(
        result["machine"]
    )
    for goal in result["goals"]:
        assert set(goal["reached"]) == SPREAD
        assert goal["met"] == _rounds.goal("", goal["reached"], **bound(goal))["met"]
    assert result["cases"]
    for case in result["cases"]:
        assert case["case"]
        assert case["sizes"]
        assert all(value > 0 for values in case.get("seconds", {}).values() for value in values)
        assert all(set(reached) == SPREAD for reached in case.get("ratios", {}).values())


def bound(goal: dict) -> dict[str, float]:
    return {key: goal[key] for key in ("at_most", "at_least") if key in goal}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_goals_are_about_what_was_measured(path: Path) -> None:
    """A goal's figure is one of the ratios, or the memory of a process, in the same file."""
    result = json.loads(path.read_text(encoding="utf-8"))
    measured = [reached for case in result["cases"] for reached in case.get("ratios", {}).values()]
    measured += [
        dict.fromkeys(("median", "low", "high"), size)
        for case in result["cases"]
        for size in case.get("process_MiB", {}).values()
    ]
    assert all(goal["reached"] in measured for goal in result["goals"])


def test_every_benchmark_for_a_cpu_is_recorded() -> None:
    assert {path.stem for path in RESULTS} >= {
        name for name in benchmarks.NAMES if not name.endswith("_cuda")
    }


def test_tables_in_readme_and_docs_are_fresh() -> None:
    call = [sys.executable, "tools/benchmarks_table.py", "--check"]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


QUANTITY = re.compile(
    r"\d\s*(?:%|×|(?:x|times|fold|[mun]?s|seconds?|percent|[KMG]i?B|[MGT]?flops?)\b)|\btwice\b|\bhalf the\b"
)


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_prose_about_speed_holds_no_number(page: str, tool: ModuleType) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for marked in (tool.SUMMARY, tool.GOALS, tool.SECTION):
        text = marked.sub("", text)
    if page == "README.md":
        text = re.search(r"## Performance\n(.*?)\n## ", text, re.DOTALL)[1]
    assert not QUANTITY.findall(text)


def test_the_pattern_for_numbers_finds_them() -> None:
    for claim in ("20 times as fast", "1.05x", "takes 3.1 s", "137 MiB", "12 %", "25x faster"):
        assert QUANTITY.search(claim), claim
    for harmless in ("two cores", "half an hour", "an eighth", "N = 384"):
        assert not QUANTITY.search(harmless), harmless


def test_tables_show_what_was_measured(tool: ModuleType) -> None:
    """Two small cases side by side, and one of many contenders as a list."""
    spread = {"median": 0.5, "low": 0.4, "high": 0.6}
    rows = [
        {
            "case": f"N = {size}",
            "sizes": {"N": size},
            "seconds": {"telos": [0.001, 0.003, 0.002], "peer": [2.0]},
            "floor_seconds": 5e-7,
            "ratios": {"telos / peer": spread},
            "memory_MiB": {"telos": 12.0, "peer": 2048.0},
        }
        for size in (8, 16)
    ]
    (grouped,) = tool.groups(rows)
    assert tool.side_by_side(grouped) == [
        "| case | telos | peer | floor | telos / peer |",
        "| --- | --- | --- | --- | --- |",
        "| N = 8 | 2 ms, 12 MiB | 2 s, 2 GiB | 0.5 us | 0.5 (0.4 to 0.6) |",
        "| N = 16 | 2 ms, 12 MiB | 2 s, 2 GiB | 0.5 us | 0.5 (0.4 to 0.6) |",
    ]
    case = {**rows[0], "seconds": {**rows[0]["seconds"], "other": [1.0]}}
    case["ratios"] = {"telos / peer": spread, "peer / telos": {"median": 2.0, "low": 2.0, "high": 2.0}}
    assert tool.listed(case)[2:] == [
        "| ratio | median (quartiles) | of the first | of the second |",
        "| --- | --- | --- | --- |",
        "| peer / telos | 2 | 2 s, 2 GiB | 2 ms, 12 MiB |",
        "| telos / peer | 0.5 (0.4 to 0.6) | 2 ms, 12 MiB | 2 s, 2 GiB |",
        "| other |  | 1 s |  |",
        "| floor |  | 0.5 us |  |",
    ]


def test_a_missed_goal_is_shown_as_missed(tool: ModuleType) -> None:
    about = {"processor": "P", "threads": 2, "torch": "2.0", "peers": {"peer": "1.0"}}
    reached = {"median": 1.5, "low": 1.4, "high": 1.6}
    results = {"job": {"machine": about, "goals": [_rounds.goal("a / b", reached, at_most=1.3)]}}
    table = tool.goals_table(results).splitlines()
    assert table[2] == "| a / b | at most 1.3 | 1.5 (1.4 to 1.6) | **missed** |"
    results["job"]["goals"].append(_rounds.goal("c / d", {**reached, "median": 0.7}, at_most=1.3))
    short = tool.goals_in_short(results).splitlines()
    assert short[2:4] == ["| `job` | at most 1.3 | 1 of 2 | a / b: 1.5 (1.4 to 1.6) |", ""]
    assert table[-1] == "`job`: P, 2 thread(s); torch 2.0, peer 1.0."
    result = {"what": "w", "cases": [], "goals": results["job"]["goals"][:1]}
    assert benchmarks.report({"job": result})[-1].split() == (
        ["MISSED", "at", "most", "1.3", "1.5", "(1.4", "to", "1.6)", "a", "/", "b"]
    )
