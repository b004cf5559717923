"""What `telos verify` runs, keeps and writes, on a toy study that counts how often it is run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from telos import evidence
from telos.evidence import _verify
from telos.evidence._verify import UsageError, VerifyError, verify

TOY = """
from pathlib import Path
from telos.evidence import Effect, Study

HERE = Path(__file__).parent


def run(seed, budget):
    with (HERE / "seeds.txt").open("a") as log:
        log.write(f"{seed}\\n")
    if seed == 103 and (HERE / "broken").exists():
        raise RuntimeError("out of luck")
    return {"gain": 1.0 + 0.1 * (seed % 3), "nothing": float("nan"), "extra": float(seed)}


STUDY = Study(
    "toy", "One exceeds nought.", "Count.", "Bound above 0.",
    (Effect("gain", "gain", 0.0), Effect("nothing", "never finite", 0.0, required=False)), "None.", run,
)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stands in for the room of studies, with one study in it."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "toy.py").write_text(TOY)
    monkeypatch.setattr(evidence, "__path__", [str(room), *evidence.__path__])
    monkeypatch.setattr(_verify, "ROOM", room)
    monkeypatch.setattr(_verify, "RESULTS", room / "results")
    monkeypatch.chdir(tmp_path)
    forget()
    yield room
    forget()


def forget() -> None:
    sys.modules.pop("telos.evidence.toy", None)
    evidence.__dict__.pop("toy", None)


def seeds_run(room: Path) -> list[int]:
    log = room / "seeds.txt"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def quick(**options: object) -> tuple[dict, bool]:
    return verify("toy", processes=1, **options)


def test_a_result_holds_all_that_a_reader_needs(toy: Path) -> None:
    result, ran = quick()
    assert ran
    assert result["verdict"] == "REPRODUCED"
    assert result["seeds"] == list(range(100, 108))
    assert seeds_run(toy) == result["seeds"]
    stored = json.loads(Path("evidence-results/toy.json").read_text())
    assert stored["slug"] == "toy"
    assert {"python", "torch", "telos"} <= set(stored["versions"])
    assert stored["source_sha256"] == _verify.source_hash("toy")
    assert stored["claim"] == "One exceeds nought."
    gain = stored["effects"][0]
    assert gain["values"] == [1.0 + 0.1 * (seed % 3) for seed in range(100, 108)]
    assert gain["lower"] < gain["mean"] < gain["upper"]
    assert stored["runs"][0]["numbers"] == {"gain": 1.1, "nothing": None, "extra": 100.0}
    assert stored["values"] == {"extra": 103.5}
    assert stored["wall_time"] >= 0
    assert Path("evidence-results/toy.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("evidence-results/toy.partial.json").exists()


def test_what_is_not_finite_is_stored_as_null(toy: Path) -> None:
    quick()
    nothing = json.loads(Path("evidence-results/toy.json").read_text())["effects"][1]
    assert nothing["values"] == [None] * 8
    assert nothing["verdict"] == "INCONCLUSIVE"


def test_a_current_result_is_not_run_again(toy: Path) -> None:
    first, _ = quick()
    content = Path("evidence-results/toy.json").read_text()
    again, ran = quick()
    assert not ran
    assert len(seeds_run(toy)) == 8
    assert again["effects"][0]["values"] == first["effects"][0]["values"]
    assert Path("evidence-results/toy.json").read_text() == content


def test_fresh_runs_it_again(toy: Path) -> None:
    quick()
    assert quick(fresh=True)[1]
    assert len(seeds_run(toy)) == 16


def test_a_changed_study_is_run_again(toy: Path) -> None:
    quick()
    (toy / "toy.py").write_text(TOY.replace("0.1 *", "0.2 *"))
    forget()
    result, ran = quick()
    assert ran
    assert len(seeds_run(toy)) == 16
    assert max(result["effects"][0]["values"]) == 1.4


def test_another_version_is_run_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick()
    monkeypatch.setattr("telos.__version__", "99.0")
    assert quick()[1]


def test_more_seeds_run_only_the_new_ones(toy: Path) -> None:
    quick()
    result, _ = quick(seeds=10)
    assert seeds_run(toy)[8:] == [108, 109]
    assert result["effects"][0]["n"] == 10


def test_fewer_seeds_do_not_lose_the_others(toy: Path) -> None:
    quick()
    result, ran = quick(seeds=3)
    assert not ran
    assert result["verdict"] == "INCONCLUSIVE"
    assert result["seeds"] == [100, 101, 102]
    quick()
    assert len(seeds_run(toy)) == 8


def test_a_run_that_breaks_keeps_its_seeds_and_goes_on(toy: Path) -> None:
    (toy / "broken").touch()
    with pytest.raises(VerifyError, match="seed 103 of toy raised RuntimeError: out of luck"):
        quick()
    partial = json.loads(Path("evidence-results/toy.partial.json").read_text())
    assert [run["seed"] for run in partial["runs"]] == [100, 101, 102]
    (toy / "broken").unlink()
    result, _ = quick()
    assert seeds_run(toy) == [100, 101, 102, 103, 103, 104, 105, 106, 107]
    assert result["effects"][0]["values"] == [1.0 + 0.1 * (seed % 3) for seed in range(100, 108)]
    assert not Path("evidence-results/toy.partial.json").exists()


def test_a_partial_file_that_was_cut_off_counts_as_none(toy: Path) -> None:
    Path("evidence-results").mkdir()
    Path("evidence-results/toy.partial.json").write_text('{"slug": "toy", "ru')
    quick()
    assert len(seeds_run(toy)) == 8


def test_the_smoke_budget_runs_one_seed_and_says_nothing(toy: Path) -> None:
    result, _ = quick(budget="smoke")
    assert seeds_run(toy) == [100]
    assert result["verdict"] == "INCONCLUSIVE"
    assert quick(budget="smoke", seeds=8)[0]["verdict"] == "INCONCLUSIVE"


def test_a_smoke_run_does_not_lose_a_finished_result(toy: Path) -> None:
    quick()
    quick(budget="smoke")
    result, ran = quick()
    assert not ran
    assert result["budget"] == "small"
    assert json.loads(Path("evidence-results/toy.json").read_text())["budget"] == "small"


def test_record_writes_the_librarys_own_result(toy: Path) -> None:
    quick()
    _, ran = quick(record=True)
    assert not ran
    recorded = json.loads((toy / "results" / "toy.json").read_text())
    assert recorded["verdict"] == "REPRODUCED"
    assert (toy / "results" / "toy.png").exists()


def test_a_recorded_result_is_not_run_again_in_order_to_record(toy: Path, tmp_path: Path) -> None:
    quick(record=True)
    assert not verify("toy", record=True, out=tmp_path / "elsewhere", processes=1)[1]


@pytest.mark.parametrize("options", [{"seeds": 7}, {"budget": "smoke"}, {"budget": "smoke", "seeds": 8}])
def test_too_little_is_not_recorded(toy: Path, options: dict) -> None:
    with pytest.raises(UsageError, match="needs at least 8 seeds and the budget small or full"):
        quick(record=True, **options)
    assert not (toy / "results").exists()
    assert seeds_run(toy) == []


def test_unknown_names_give_the_nearest(toy: Path) -> None:
    with pytest.raises(UsageError, match="no study is called 'tooy'; the nearest names are toy"):
        verify("tooy")
    with pytest.raises(UsageError, match="budget must be one of smoke, small, full, got 'large'"):
        quick(budget="large")
    with pytest.raises(UsageError, match="seeds must be at least 1"):
        quick(seeds=0)


def test_a_study_of_ones_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_claims").mkdir()
    (tmp_path / "my_claims" / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result, _ = verify("my_claims.toy", processes=1)
    assert result["verdict"] == "REPRODUCED"
    assert Path("evidence-results/my_claims.toy.json").exists()
    with pytest.raises(UsageError, match="only the library's own"):
        verify("my_claims.toy", record=True)
    with pytest.raises(UsageError, match=r"no module 'my_claims\.other'"):
        verify("my_claims.other")


def test_two_processes_give_the_numbers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_claims").mkdir()
    (tmp_path / "their_claims" / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    seen: list[tuple[int, int]] = []
    both, _ = verify(
        "their_claims.toy", seeds=4, processes=2, out=Path("two"), progress=lambda *s: seen.append(s)
    )
    one, _ = verify("their_claims.toy", seeds=4, processes=1, out=Path("one"))
    assert both["effects"] == one["effects"]
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


KILL = """
import os, signal, sys
from pathlib import Path
from telos.evidence import _verify

def progress(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

_verify.verify("our_claims.toy", processes=1, progress=progress)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_claims").mkdir()
    (tmp_path / "our_claims" / "toy.py").write_text(TOY)
    killed = subprocess.run([sys.executable, "-c", KILL], cwd=tmp_path, check=False)
    assert killed.returncode == -9
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result, _ = verify("our_claims.toy", processes=1)
    assert seeds_run(tmp_path / "our_claims") == list(range(100, 108))
    assert result["seeds"] == list(range(100, 108))
