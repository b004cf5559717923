"""Words of the command line, of TOML files and of Python, which say the same things."""

import tomllib
from pathlib import Path

import pytest

from telos.lab import command
from telos.lab.words import DEFAULTS, HELP, Words, configuration, duration
from telos.trials import UsageError
from telos.trials.sources import TASK_KEYS

BLOBS = "tests.trials.examples:BLOBS"


def test_words_about_the_data_become_part_of_the_task() -> None:
    words = Words.parse(["a b.csv", "target=the label", "loss=focal", "group=patient"])
    assert words.tasks == ("'a b.csv' 'target=the label' group=patient",)
    assert words.command == "telos compare 'a b.csv' 'target=the label' group=patient loss=focal"


def test_a_comma_separates_tasks_unless_a_file_has_it(tmp_path: Path) -> None:
    assert Words.parse(["digits, wine", "loss=focal"]).tasks == ("digits", "wine")
    odd = tmp_path / "a,b.csv"
    odd.write_text("x,y\n1,2\n")
    assert len(Words.parse([str(odd), "target=y", "loss=focal"]).tasks) == 1
    for text, message in (("digits,", "empty entry"), ("wine,wine", "names one twice")):
        with pytest.raises(UsageError, match=message):
            Words.parse([text, "loss=focal"]).tasks  # noqa: B018


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("2h", 7200.0)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["0", "-3s", "soon", "1.2.3s", "inf", "1e400h", ""])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="max_time must be a time"):
        duration(text)


def test_every_key_is_explained_and_none_means_two_things() -> None:
    assert HELP.keys() == DEFAULTS.keys()
    assert not DEFAULTS.keys() & TASK_KEYS.keys()


def test_a_written_configuration_is_read_as_the_same_words(tmp_path: Path) -> None:
    given = ["data.csv", "target=a \"quoted\" \\ name", "loss=cross_entropy,focal:gamma=2", "seeds=7",
             "max_time=90s", "reference=false", "band=0.02"]  # fmt: skip
    words = Words.parse(given)
    path = tmp_path / "comparison.toml"
    path.write_text(configuration(words))
    assert Words.parse([str(path)]) == words
    # a word on the command line wins
    assert Words.parse([str(path), "seeds=3"]).values["seeds"] == 3


def test_the_plain_configuration_explains_every_key() -> None:
    text = configuration()
    assert tomllib.loads(text) == {"task": "digits", "loss": ["cross_entropy", "focal"]}
    for key in {**DEFAULTS, **TASK_KEYS}:
        assert f"\n# {key} = " in text or f"\n{key} = " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = ", "is no TOML file"),
        ('loss = "focal"', "names no task"),
        ('task = "digits"\nlos = "focal"', "unknown key 'los'; nearest: loss"),
        ('task = "digits"\n[loss]\na = 1', "loss must be a text, a number or a list"),
        ('task = "digits"\nloss = "focal"\nseeds = 1.5', "seeds must be a whole number"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        Words.parse([str(path)])


def test_a_missing_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Words.parse([str(tmp_path / "none.toml")])


def test_adding_keeps_the_comparison_as_it_was() -> None:
    with pytest.raises(UsageError, match="seeds= cannot be changed with --add"):
        Words.parse(["runs/x", "--add", "loss=focal", "seeds=3"])


def test_init_writes_what_compare_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    assert command.init([BLOBS, "loss=focal", "seeds=1", "trials=1", "processes=0"]) == 0
    assert "comparison.toml; run it with: telos compare comparison.toml" in capsys.readouterr().out
    assert command.compare(["comparison.toml", "--quiet"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert command.init([]) == 2
    assert "comparison.toml is there already" in capsys.readouterr().err


def test_a_password_is_not_kept() -> None:
    """The command goes into the store, the report and ``--json``; the connection itself has the password."""
    words = Words.parse(["digits", "loss=mse", "store=postgresql+psycopg://me:p:s3cr@t@host/runs"])
    assert "s3cr" not in words.command
    assert "store=postgresql+psycopg://me:PASSWORD@host/runs" in words.command
    assert words.values["store"].endswith("p:s3cr@t@host/runs")
