"""The command line: what it prints, what it refuses and what it does not import."""

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import telos
from telos import _catalogue, cli


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["telos", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(exit_.value.code or 0, printed.out, printed.err)

    return call


def test_version(run) -> None:
    assert run("--version").out == f"telos {telos.__version__}\n"


# ---------------------------------------------------------------------------------------------------- list


def test_list_holds_every_paper(run) -> None:
    rows = json.loads(run("list", "--json").out)
    assert [row["number"] for row in rows] == list(range(1, 130))
    for row in rows:
        assert {"slug", "implemented", "golden", "verdict"} <= set(row)
        assert isinstance(row["implemented"], bool)
        assert isinstance(row["golden"], bool)
        assert row["verdict"] in (None, "REPRODUCED", "NOT REPRODUCED", "INCONCLUSIVE")


def test_list_filters(run) -> None:
    everything = json.loads(run("list", "--json").out)

    def slugs(*words: str) -> list[str]:
        return [row["slug"] for row in json.loads(run("list", *words, "--json").out)]

    assert slugs("--implemented") == [row["slug"] for row in everything if row["implemented"]]
    assert slugs("--golden") == [row["slug"] for row in everything if row["golden"]]
    for word, verdict in [
        ("reproduced", "REPRODUCED"),
        ("not-reproduced", "NOT REPRODUCED"),
        ("NOT REPRODUCED", "NOT REPRODUCED"),
        ("inconclusive", "INCONCLUSIVE"),
        ("none", None),
    ]:
        assert slugs("--verdict", word) == [row["slug"] for row in everything if row["verdict"] == verdict]
    assert slugs("--search", "spherical family") == ["z_loss"]
    assert "stablemax_perpgrad" in slugs("--search", "PerpGrad")
    assert slugs("--search", "no such words") == []


def test_list_prints_a_line_for_each_paper(run) -> None:
    out = run("list").out
    lines = out.splitlines()
    assert "129 of 129 papers" in lines[-1]
    for paper in _catalogue.papers():
        assert sum(f" {paper['slug']} " in line for line in lines) == 1


def test_list_shows_whole_slugs_on_a_narrow_terminal(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert " pix2pixhd_pseudolabel_ensemble " in run("list").out


def test_unknown_verdict(run) -> None:
    outcome = run("list", "--verdict", "reprodced")
    assert outcome.code == 2
    assert "there is no verdict 'reprodced'; the nearest names are reproduced" in outcome.err


# ---------------------------------------------------------------------------------------------------- show


def test_show_tells_all_about_a_method(run) -> None:
    out = run("show", "comp_sum").out
    paper = next(paper for paper in _catalogue.papers() if paper["slug"] == "comp_sum")
    assert paper["title"] in out
    assert "https://arxiv.org/abs/2304.07288" in out
    assert "Phi_tau(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau)" in out
    assert "from telos.losses import comp_sum_loss" in out
    assert "searched over uniform(0, 2)" in out
    assert "telos.losses.smooth_adversarial_comp_sum_loss" in out
    for heading in (
        "When to use it",
        "Defaults",
        "Args",
        "Returns",
        "Raises",
        "Source",
        "Example",
        "Evidence",
    ):
        assert f"\n{heading}\n" in out
    assert "``" not in out
    assert ":func:" not in out


def test_show_json(run) -> None:
    paper = json.loads(run("show", "comp_sum", "--json").out)
    assert paper["slug"] == "comp_sum"
    first = paper["symbols"][0]
    assert first["import"] == "from telos.losses import comp_sum_loss"
    assert first["defaults"]["tau"] == "1.0"
    assert first["space"] == {"tau": "uniform(0, 2)"}


@pytest.mark.parametrize("name", ["focal_loss", "FocalLoss", "focalloss", "telos.losses.FocalLoss"])
def test_show_a_symbol(run, name: str) -> None:
    assert "(1 - p_y)^gamma" in run("show", "focal_loss").out
    symbol = json.loads(run("show", name, "--json").out)
    assert symbol["name"].replace("_", "").lower() == "focalloss"


def test_a_slug_comes_before_a_symbol_of_the_same_name(run) -> None:
    assert json.loads(run("show", "z_loss", "--json").out)["number"] == 13


def test_show_what_is_not_implemented(run) -> None:
    paper = next(paper for paper in _catalogue.papers() if not paper["implemented"])
    assert "Not implemented yet." in run("show", paper["slug"]).out


@pytest.mark.parametrize(
    ("typed", "meant"), [("z_los", "z_loss"), ("FocalLos", "FocalLoss"), ("mip", "mip_loss")]
)
def test_unknown_name_gives_the_nearest(run, typed: str, meant: str) -> None:
    outcome = run("show", typed)
    assert outcome.code == 2
    assert outcome.out == ""
    assert f"nothing is called '{typed}'" in outcome.err
    assert meant in outcome.err


def test_a_name_like_no_other_points_to_the_list(run) -> None:
    assert "`telos list` shows the names" in run("show", "qqqqqq").err


def test_a_verdict_is_shown_with_its_numbers(run, monkeypatch: pytest.MonkeyPatch) -> None:
    effect = {
        "name": "gain", "description": "gain", "threshold": 0.5, "required": True, "mean": 0.25, "sd": 0.125,
        "n": 8, "lower": 0.1875, "upper": 0.3125, "verdict": "NOT REPRODUCED", "values": [0.25] * 8,
    }  # fmt: skip
    evidence = {
        "claim": "More is more.", "verdict": "NOT REPRODUCED", "reason": "gain: upper bound 0.3125 < 0.5",
        "budget": "small", "seeds": list(range(8)), "effects": [effect], "wall_time": 12.0, "stale": True,
    }  # fmt: skip
    paper = next(paper for paper in _catalogue.papers() if paper["slug"] == "comp_sum")
    monkeypatch.setattr(
        _catalogue, "papers", lambda: [{**paper, "evidence": evidence, "verdict": "NOT REPRODUCED"}]
    )
    out = run("show", "comp_sum").out
    for text in ("More is more.", "NOT REPRODUCED", "upper bound 0.3125 < 0.5", "8 seeds", "0.1875", "STALE"):
        assert text in out
    assert "NOT REPRODUCED (stale)" in run("list").out


@pytest.mark.parametrize(
    "words", [["list"], ["list", "--json"], ["show", "comp_sum"], ["--version"], ["show", "zz"]]
)
def test_torch_is_not_imported(words: list[str]) -> None:
    code = (
        "import sys\nfrom telos.cli import main\n"
        f"sys.argv = ['telos', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_module_runs_as_a_program() -> None:
    call = [sys.executable, "-m", "telos.cli", "--version"]
    assert telos.__version__ in subprocess.run(call, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_one_sentence(missing: str) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom telos.cli import main\nmain()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"telos: the command line needs {missing}; install it with: pip install 'telos[lab]'\n"
    )


def test_an_extra_that_a_command_misses_is_one_sentence(run, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = types.ModuleType("telos.lab.command")

    def compare(words: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    lab.compare = compare
    replace_lab(monkeypatch, lab)
    outcome = run("compare", "digits")
    assert outcome.code == 1
    assert outcome.err == "telos: this command needs plotly; install it with: pip install 'telos[lab]'\n"


# ----------------------------------------------------------------------------------------- compare, report


def replace_lab(monkeypatch: pytest.MonkeyPatch, command: types.ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "telos.lab.command", command)
    monkeypatch.setattr("telos.lab.command", command, raising=False)


@pytest.mark.parametrize("name", ["compare", "report"])
def test_words_are_passed_through_in_their_order(run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[list[str]] = []
    command = types.ModuleType("telos.lab.command")
    setattr(command, name, lambda words: seen.append(list(words)))
    replace_lab(monkeypatch, command)
    words = ["digits", "loss=z_loss+0.1*focal:gamma=2", "--dry-run", "seeds=3", "--out", "x"]
    assert run(name, *words).code == 0
    assert seen == [words]


def test_the_exit_code_of_the_lab_is_kept(run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = types.ModuleType("telos.lab.command")
    command.compare = lambda words: 2
    replace_lab(monkeypatch, command)
    assert run("compare", "digits").code == 2


# -------------------------------------------------------------------------------------------------- verify

CLAIM = """
from telos.evidence import Effect, Study

def run(seed, budget):
    if budget == "full":
        raise RuntimeError("no GPU here")
    return {"gain": GAIN + 0.01 * (seed % 3)}

STUDY = Study("claim", "Gain.", "p", "d", (Effect("gain", "gain", 0.0),), "none", run)
"""


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "cli_claims"
    package.mkdir()
    (package / "good.py").write_text(CLAIM.replace("GAIN", "1.0"))
    (package / "bad.py").write_text(CLAIM.replace("GAIN", "-1.0"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "verdict"), [("good", "REPRODUCED"), ("bad", "NOT REPRODUCED")])
def test_verify_ends_with_0_whatever_the_verdict(run, claims: Path, name: str, verdict: str) -> None:
    outcome = run("verify", f"cli_claims.{name}", "--processes", "1")
    assert outcome.code == 0
    assert f"{verdict} (8 seeds, budget small" in outcome.out
    assert json.loads((claims / f"evidence-results/cli_claims.{name}.json").read_text())["verdict"] == verdict


def test_verify_prints_clean_json(run, claims: Path) -> None:
    outcome = run("verify", "cli_claims.good", "--seeds", "2", "--processes", "1", "--json", "--out", "here")
    result = json.loads(outcome.out)
    assert result["seeds"] == [100, 101]
    assert (claims / "here" / "cli_claims.good.png").exists()


def test_a_study_that_raises_ends_with_1(run, claims: Path) -> None:
    outcome = run("verify", "cli_claims.good", "--budget", "full", "--processes", "1")
    assert outcome.code == 1
    assert "seed 100 of cli_claims.good raised RuntimeError: no GPU here" in outcome.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["z_los"], "no study is called 'z_los'"),
        (["cli_claims.good", "--budget", "tiny"], "budget must be one of smoke, small, full, got 'tiny'"),
        (["cli_claims.good", "--record", "--seeds", "3"], "needs at least 8 seeds"),
        ([], "give a slug or --all"),
        (["z_loss", "--all"], "give a slug or --all"),
    ],
)
def test_verify_refuses(run, claims: Path, words: list[str], message: str) -> None:
    outcome = run("verify", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (claims / "evidence-results").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(run, claims: Path) -> None:
    (claims / "file").write_text("")
    outcome = run("verify", "cli_claims.good", "--seeds", "1", "--out", "file/inside")
    assert outcome.code == 1
    assert outcome.err.startswith("telos: ")
    assert "Traceback" not in outcome.err


def test_all_runs_what_is_not_current_and_reports_failures(
    run, claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from telos.evidence import _verify

    (claims / "cli_claims" / "broken.py").write_text(CLAIM.replace("GAIN", "1 / 0"))
    names = ["cli_claims.bad", "cli_claims.broken", "cli_claims.good"]
    monkeypatch.setattr(_verify, "study_names", lambda: names)
    first = run("verify", "--all", "--json", "--processes", "1")
    assert first.code == 1
    assert "ZeroDivisionError" in first.err
    assert [result["verdict"] for result in json.loads(first.out)] == ["NOT REPRODUCED", "REPRODUCED"]
    runs: list[int] = []
    monkeypatch.setattr(_verify, "_run_seed", lambda name, seed, budget: runs.append(seed))
    names.remove("cli_claims.broken")
    again = run("verify", "--all", "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads(first.out)
    assert runs == []
