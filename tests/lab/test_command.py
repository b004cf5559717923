"""``telos compare`` as a user meets it: words, exit codes, errors, and ``kill -9``."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from telos.lab import command
from telos.lab.command import Words

BLOBS = "tests.trials.examples:BLOBS"
SMALL = ["seeds=2", "trials=2", "tuning_seeds=1", "processes=0"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def stored(path: Path) -> dict[str, tuple[str, dict, str]]:
    """Status, metrics and time of every run in a store."""
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
        found = connection.execute("select key, status, metrics, ended from runs").fetchall()
    return {key: (status, json.loads(metrics), ended) for key, status, metrics, ended in found}


def test_compare_writes_page_store_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [BLOBS, "loss=cross_entropy,focal,smooth_adversarial_comp_sum", *SMALL, f"out={tmp_path}/demo"]
    assert command.compare(words) == 0
    captured = capsys.readouterr()
    assert "focal" in captured.out
    assert f"report: {tmp_path}/demo/report.html" in captured.out
    assert "refused smooth_adversarial_comp_sum: " in captured.err
    assert (tmp_path / "demo" / "report.html").stat().st_size > 1_000_000
    assert len((tmp_path / "demo" / "leaderboard.csv").read_text().splitlines()) == 4
    assert len(stored(tmp_path / "demo" / "store.sqlite")) == 2 * (2 + 2)


def test_the_same_command_twice_gives_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boards = []
    for name in ("one", "two", "two"):
        words = [BLOBS, "loss=cross_entropy,focal", *SMALL, f"out={tmp_path}/{name}", "--json"]
        assert command.compare(words) == 0
        board = json.loads(capsys.readouterr().out)["leaderboard"]
        boards.append([{k: v for k, v in row.items() if k != "seconds"} for row in board])
    assert boards[0] == boards[1] == boards[2]


def test_quiet_prints_the_path_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.compare([BLOBS, "loss=focal", *SMALL, "trials=1", f"out={tmp_path}", "--quiet"][:-3]) == 0
    capsys.readouterr()
    words = [BLOBS, "loss=focal", "seeds=1", "trials=1", "processes=0", f"out={tmp_path}", "--quiet"]
    assert command.compare(words) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}/report.html\n"
    assert captured.err == ""


def test_the_folder_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(Path(__file__).parents[2])
    monkeypatch.syspath_prepend(root)
    monkeypatch.chdir(tmp_path)
    words = [BLOBS, "loss=focal", "seeds=1", "trials=1", "processes=0", "--quiet"]
    assert command.compare(words) == 0
    assert command.compare([*words[:-1], "epochs=3", "--quiet"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first != second
    assert first.startswith("runs/BLOBS-")
    assert (tmp_path / first).is_file()


def test_a_dry_run_trains_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [BLOBS, "loss=cross_entropy,focal,ens", *SMALL, f"out={tmp_path}/x", "--dry-run"]
    assert command.compare(words) == 0
    text = capsys.readouterr().out
    assert "8 runs of 2 epochs" in text
    assert "gamma: " in text
    assert "is for two classes" in text
    assert "s a run" in text
    assert not (tmp_path / "x").exists()


def test_report_renders_again_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.compare([BLOBS, "loss=cross_entropy,focal", *SMALL, f"out={tmp_path}/a"]) == 0
    table = capsys.readouterr().out.split("report:")[0]
    before = stored(tmp_path / "a" / "store.sqlite")
    for words, page in (
        ([f"{tmp_path}/a/store.sqlite", f"{tmp_path}/b"], "b/report.html"),
        ([f"{tmp_path}/a", f"{tmp_path}/c/page.html"], "c/page.html"),
        ([f"{tmp_path}/a"], "a/report.html"),
    ):
        assert command.report(words) == 0
        assert capsys.readouterr().out.split("report:")[0] == table
        assert (tmp_path / page).read_text() == (tmp_path / "a" / "report.html").read_text()
    assert stored(tmp_path / "a" / "store.sqlite") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit", "loss=focal"], "unknown task 'digit'; nearest: digits"),
        (["digits", "loss=fokal"], "unknown loss 'fokal'; nearest: focal"),
        (["digits", "loss=focal", "sedes=3"], "unknown key 'sedes' in 'sedes=3'; nearest: seeds"),
        (["digits", "loss=focal", "seeds=ten"], "seeds must be a whole number, got 'ten'"),
        (["digits", "loss=focal", "band=wide"], "band must be a number, got 'wide'"),
        (["digits", "loss=focal", "epochs=0"], "epochs must be at least 1, got 0"),
        (["digits", "loss=focal", "loss=ens"], "loss= is given twice"),
        (["digits", "loss=focal", "--dryrun"], "unknown flag --dryrun; nearest: --dry-run"),
        (["digits"], "loss= is missing"),
        (["loss=focal"], "name one task, got none"),
        (["digits", "wine", "loss=focal"], "name one task, got 'digits', 'wine'"),
        (["digits", "loss=ens,smooth_adversarial_comp_sum"], "no recipe fits the task digits: ens: "),
        (["digits", "loss=focal", "metric=acuracy"], "has no metric 'acuracy'; nearest: accuracy"),
    ],
)
def test_words_that_make_no_sense(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.compare(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("telos compare: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_command_to_repeat_is_one_that_repeats() -> None:
    words = ["digits", "loss=z_loss+0.1*focal,torch.nn:CrossEntropyLoss", "seeds=3", "trials=20", "out=a b"]
    text = Words.parse([*words, "--quiet"]).command
    assert text == "telos compare digits 'loss=z_loss+0.1*focal,torch.nn:CrossEntropyLoss' seeds=3 'out=a b'"
    import shlex

    assert Words.parse(shlex.split(text)[2:]).values == Words.parse(words).values


def test_a_recipe_that_diverges_or_raises_is_shown_and_the_others_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "tests.trials.examples:Exploding,tests.trials.examples:Raising"
    words = [BLOBS, f"loss=cross_entropy,{bad}", *SMALL, f"out={tmp_path}"]
    assert command.compare(words) == 0
    out = capsys.readouterr().out
    assert "diverged: loss is inf at step 3" in out
    assert "failed: RuntimeError: <b>this loss</b> never works" in out
    assert "baseline" in out
    assert command.compare([BLOBS, f"loss={bad}", *SMALL, f"out={tmp_path}/none"]) == 1
    assert "No recipe finished" in capsys.readouterr().out


def test_stores_that_cannot_be_used_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "old").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "old" / "store.sqlite")) as connection:
        connection.execute("create table telos_schema (version integer)")
        connection.execute("insert into telos_schema values (7)")
        connection.commit()
    for out, message in (("file/x", "Not a directory"), ("old", "schema version 7")):
        assert command.compare([BLOBS, "loss=focal", *SMALL, f"out={tmp_path}/{out}"]) == 1
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1
    assert command.report([str(tmp_path / "none.sqlite"), str(tmp_path)]) == 1
    assert "there is no store at" in capsys.readouterr().err
    assert command.report([]) == 2


def test_a_page_that_cannot_be_written_loses_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()
    words = [BLOBS, "loss=focal", "seeds=1", "trials=1", "processes=0", f"out={tmp_path}"]
    assert command.compare(words) == 1
    assert "the runs are in the store, but" in capsys.readouterr().err
    assert len(stored(tmp_path / "store.sqlite")) == 1


def test_an_interrupt_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from telos.trials import runner

    run_job, calls = runner.run_job, []

    def interrupted(job: runner.Job) -> object:
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_job(job)

    monkeypatch.setattr(runner, "run_job", interrupted)
    words = [BLOBS, "loss=cross_entropy,focal", *SMALL, f"out={tmp_path}"]
    assert command.compare(words) == 130
    assert "interrupted; finished runs are in the store" in capsys.readouterr().err
    assert len(stored(tmp_path / "store.sqlite")) == 2
    monkeypatch.undo()
    assert command.compare(words) == 0
    assert len(stored(tmp_path / "store.sqlite")) == 8


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers through /proc")
def test_kill_9_and_the_same_command_goes_on(tmp_path: Path) -> None:
    # runs of a tenth of a second or more: long enough to be caught in the middle
    words = [BLOBS, "loss=cross_entropy,focal", "seeds=3", "trials=3", "tuning_seeds=2", "epochs=60"]
    every = 2 * (3 * 2 + 3)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    line = [
        sys.executable,
        "-m",
        "telos.lab.command",
        "compare",
        *words,
        "processes=2",
        f"out={killed}",
        "--quiet",
    ]
    root = Path(__file__).parents[2]  # where the task can be imported from

    process = subprocess.Popen(line, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ((killed / "store.sqlite").is_file() and len(_stored_so_far(killed / "store.sqlite")) >= 3):
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = stored(killed / "store.sqlite")
    assert 3 <= len(before) < every

    # nobody is left behind
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    again = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0, again.stderr
    assert (killed / "report.html").is_file()
    after = stored(killed / "store.sqlite")
    assert len(after) == every
    # no finished run was lost or repeated: not even its time has changed
    assert {key: after[key] for key in before} == before

    assert command.compare([*words, "processes=0", f"out={undisturbed}", "--quiet"]) == 0
    assert _numbers(killed / "store.sqlite") == _numbers(undisturbed / "store.sqlite")


def _numbers(path: Path) -> dict[tuple[str, int, int], tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("select recipe, trial, seed, status, metrics from runs").fetchall()
    return {(recipe, trial, seed): (status, metrics) for recipe, trial, seed, status, metrics in found}


def _stored_so_far(path: Path) -> dict[str, tuple[str, dict, str]]:
    try:
        return stored(path)
    except sqlite3.OperationalError:  # its tables are not made yet
        return {}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
