"""The result object, several tasks at once, runs and exports."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import telos.lab
from telos.lab import Result, command, compare
from telos.lab.export import recipe_code
from telos.lab.leaderboard import write_table
from telos.trials import Suite, UsageError, parse_recipes

BLOBS = "tests.trials.examples:BLOBS"
FEW = {"seeds": 2, "trials": 1, "epochs": 2}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compare(BLOBS, "cross_entropy,focal,ens", out=tmp_path_factory.mktemp("out"), **FEW)


@pytest.fixture(scope="module")
def several() -> Result:
    return compare(f"{BLOBS},wine", "cross_entropy,focal", **FEW)


def test_a_result_shows_itself(result: Result) -> None:
    assert result.table["recipe"].to_list()[-1] == "ens"
    assert result.best() is None
    assert "cannot carry a test" in result.conclusion
    html = result._repr_html_()
    assert html.startswith("<table>")
    assert "focal" in html


def test_what_users_wrote_stays_text_in_a_notebook(result: Result) -> None:
    found = result.found
    entries = tuple(
        replace(entry, recipe=replace(entry.recipe, label="<script>alert(1)</script>"))
        for entry in found.entries
    )
    html = Result(replace(found, entries=entries), Path())._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_best_is_what_is_better_after_correction(result: Result) -> None:
    better = compare(BLOBS, "mae,cross_entropy", seeds=8, trials=1, epochs=12)
    found = better.found.differences()["cross_entropy"]
    assert better.best() == ("cross_entropy" if found.verdict == "better" else None)
    same = compare(BLOBS, "cross_entropy,torch.nn:CrossEntropyLoss", seeds=8, trials=1)
    assert same.best() is None


def test_a_loss_against_itself_under_two_names_is_no_difference() -> None:
    same = compare(BLOBS, "cross_entropy,torch.nn:CrossEntropyLoss", seeds=10, trials=1)
    difference = same.found.differences()["torch.nn:CrossEntropyLoss"]
    assert difference.estimate.mean == pytest.approx(0, abs=1e-12)
    assert difference.verdict == "practically equal"
    assert "better" not in same.conclusion


@pytest.mark.parametrize("kind", ["difference", "seeds", "curves", "time"])
def test_plots_of_one_task(result: Result, kind: str) -> None:
    figure = result.plot(kind)
    assert len(figure.data) >= 1
    assert figure.layout.xaxis.title.text or figure.layout.yaxis.title.text


def test_plots_of_several_tasks(several: Result) -> None:
    assert "too few data sets" in several.plot().layout.title.text
    assert {trace.name for trace in several.plot("profiles").data} == {"cross_entropy", "focal"}
    with pytest.raises(UsageError, match="unknown plot 'difference'"):
        several.plot("difference")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".tex", ".md"])
def test_tables_are_written_by_their_suffix(
    result: Result, several: Result, tmp_path: Path, suffix: str
) -> None:
    for number, found in enumerate((result, several)):
        path = found.save(tmp_path / f"{number}{suffix}")
        if suffix in (".csv", ".parquet"):
            read = pl.read_csv(path) if suffix == ".csv" else pl.read_parquet(path)
            assert read["recipe"].to_list() == found.table["recipe"].to_list()
        else:
            assert "focal" in path.read_text()


def test_special_letters_are_escaped_in_printed_tables(result: Result, tmp_path: Path) -> None:
    found = result.found
    entries = tuple(
        replace(entry, recipe=replace(entry.recipe, label="a_b & 50% | <b> \\x")) for entry in found.entries
    )
    odd = replace(found, entries=entries)
    assert r"a\_b \& 50\% | <b> \textbackslash{}x" in write_table(odd, tmp_path / "t.tex").read_text()
    assert r"a_b & 50% \| &lt;b> \\x" in write_table(odd, tmp_path / "t.md").read_text()
    with pytest.raises(UsageError, match=r"got .*t\.xlsx"):
        write_table(odd, tmp_path / "t.xlsx")


def test_several_tasks_are_ranked(several: Result) -> None:
    assert isinstance(several.found, Suite)
    assert len(several.comparisons) == 2
    assert several.table.columns[:2] == ["recipe", "mean rank"]
    assert "Over 2 data sets" in several.conclusion
    assert several.best() is None


def test_python_and_the_command_line_share_their_runs(
    result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [BLOBS, "loss=cross_entropy,focal,ens", "seeds=2", "trials=1", "epochs=2", "processes=0"]
    assert command.compare([*words, f"out={result.folder}", "--json"]) == 0
    board = json.loads(capsys.readouterr().out)["leaderboard"]
    assert [row["accuracy"] for row in board] == result.table["accuracy"].to_list()
    store = json.loads(_runs(["list", str(result.folder), "--json"], capsys))
    assert len(store["runs"]) == 4


def test_unknown_arguments_are_named() -> None:
    with pytest.raises(UsageError, match="unknown argument 'taget'; nearest: target"):
        compare("wine", "focal", taget="x")


def test_adding_a_loss_reuses_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [BLOBS, "loss=cross_entropy,focal", "seeds=2", "trials=1", "processes=0", f"out={tmp_path}/a"]
    assert command.compare([*words, "--quiet"]) == 0
    before = {run["key"] for run in json.loads(_runs(["list", f"{tmp_path}/a", "--json"], capsys))["runs"]}
    assert command.compare([f"{tmp_path}/a", "--add", "loss=mae", "processes=0", "--quiet"]) == 0
    capsys.readouterr()
    after = {run["key"] for run in json.loads(_runs(["list", f"{tmp_path}/a", "--json"], capsys))["runs"]}
    assert before < after
    assert len(after) == 6
    assert telos.lab.load(tmp_path / "a").table.height == 3


def test_several_tasks_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{BLOBS},wine", "loss=cross_entropy,focal", "seeds=2", "trials=1", "epochs=1", "processes=0"]
    assert command.compare([*words, f"out={tmp_path}/s", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [task["task"] for task in summary["tasks"]] == [BLOBS, "wine"]
    assert isinstance(telos.lab.load(tmp_path / "s").found, Suite)
    assert command.report([f"{tmp_path}/s", f"{tmp_path}/ranks.md"]) == 0
    assert "mean rank" in (tmp_path / "ranks.md").read_text()


# ------------------------------------------------------------------------------------------------- the store


def _runs(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert command.runs(words) == 0
    return capsys.readouterr().out


def test_runs_are_listed_shown_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = compare(BLOBS, "cross_entropy,focal", out=tmp_path, **FEW)
    listed = json.loads(_runs(["list", str(tmp_path), "--json"], capsys))
    key = listed["runs"][0]["key"]
    assert len(listed["comparisons"]) == 1
    assert "focal" in _runs([str(tmp_path)], capsys)
    shown = json.loads(_runs(["show", key[:10], str(tmp_path)], capsys))
    assert shown["key"] == key
    assert len(shown["curve"]) == 2
    assert "removed run" in _runs(["remove", key[:10], str(tmp_path)], capsys)
    assert len(json.loads(_runs(["list", str(tmp_path), "--json"], capsys))["runs"]) == 3
    plan = made.found.plan.key
    assert "3 runs" in _runs(["remove", plan[:10], str(tmp_path), "--runs"], capsys)
    assert json.loads(_runs(["list", str(tmp_path), "--json"], capsys)) == {"comparisons": [], "runs": []}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["show", "0000", "{store}"], 1, "0000"),
        (["remove", "ab", "{store}"], 2, "at least 4 letters"),
        (["--most", "{store}"], 2, "unknown flag --most"),
        (["nowhere.sqlite"], 1, "there is no store at nowhere.sqlite"),
        (["show"], 2, "the form is"),
    ],
)
def test_runs_that_make_no_sense(
    result: Result, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.runs([word.format(store=result.folder) for word in words]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- exporting


@pytest.mark.parametrize(
    ("loss", "optim", "lines"),
    [
        ("focal:gamma=3", "sgd", ["return FocalLoss(gamma=3)", "lr=0.001, weight_decay=0.01, momentum=0.9)"]),
        ("gce+0.1*focal", "adamw", ["return Mixture([(1.0, GCELoss()), (0.1, FocalLoss())])"]),
        ("torch.nn:CrossEntropyLoss", "perpgrad", ["return CrossEntropyLoss()", "return PerpGrad(base), base"]),
        ("aldr_kl", "adamw", ["return ALDRKLLoss.from_task(info"]),
    ],
)  # fmt: skip
def test_recipes_are_written_as_python(loss: str, optim: str, lines: list[str]) -> None:
    (recipe,) = parse_recipes(loss, optim)
    code = recipe_code(recipe, {"learning_rate": 0.001, "weight_decay": 0.01})
    for line in lines:
        assert line in code
    compile(code, "recipe.py", "exec")


class AnyKeyword(torch.nn.CrossEntropyLoss):
    def __init__(self, **keywords: object) -> None:
        super().__init__()


def test_what_a_store_says_does_not_become_code() -> None:
    """Texts of a store from elsewhere stay texts in the files that are written and run."""
    chosen = {"learning_rate": 0.001, "weight_decay": 0.01}
    (recipe,) = parse_recipes('ldr_kl:normalize=\'"""; raise SystemExit; """\'')
    tree = ast.parse(recipe_code(recipe, chosen))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    (recipe,) = parse_recipes(f"{__name__}:AnyKeyword:print(1) or a=2")
    with pytest.raises(UsageError, match="is no name"):
        recipe_code(recipe, chosen)


@pytest.mark.slow
def test_an_exported_run_trains_again_to_the_same_numbers(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.export(["best", str(result.folder), str(tmp_path / "best")]) == 0
    assert "trained again with the stored numbers" in capsys.readouterr().out
    facts = json.loads((tmp_path / "best" / "run.json").read_text())
    assert facts["again"] == pytest.approx(
        {name: value for name, value in facts["metrics"].items() if name.startswith("test_")}
    )
    weights = load_file(tmp_path / "best" / "weights.safetensors")
    assert "model.0.weight" in weights
    script = (tmp_path / "best" / "train.py").read_text()
    assert "telos.lab" not in script
    # and without the store, from another process
    done = subprocess.run(
        [sys.executable, str(tmp_path / "best" / "train.py")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert f"test_accuracy {facts['again']['test_accuracy']!r}" in done.stdout


def test_tuning_runs_have_no_model_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(BLOBS, "focal", seeds=1, trials=2, tuning_seeds=1, out=tmp_path)
    listed = json.loads(_runs(["list", str(tmp_path), "--json", "--all"], capsys))
    tuning = next(run["key"] for run in listed["runs"] if run["role"] == "tuning")
    assert command.export([tuning, str(tmp_path)]) == 2
    assert "only an evaluation run that finished" in capsys.readouterr().err


def test_a_budget_is_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # far more runs than any machine does in six seconds
    words = [BLOBS, "loss=cross_entropy,focal", "seeds=2000", "epochs=10", "trials=1", "processes=0"]
    assert command.compare([*words, "max_time=6s", f"out={tmp_path}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "max_time ended it" in said["conclusion"]
    counts = {row["seeds"] for row in said["leaderboard"]}
    assert len(counts) == 1
    assert 0 < counts.pop() < 2000
