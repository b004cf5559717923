"""The front door: ``telos list``, ``show``, ``verify``, ``compare`` and ``report``.

``list`` and ``show`` read the generated catalogue and do not import torch; the others import what they run.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import telos
from telos import _catalogue

try:
    import typer
    from rich.console import Console
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise SystemExit(
        f"telos: the command line needs {str(error.name).partition('.')[0]}; "
        "install it with: pip install 'telos[lab]'"
    ) from None

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Training objectives for PyTorch, each with its evidence.",
)
output = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

COLOURS = {"REPRODUCED": "green", "NOT REPRODUCED": "red", "INCONCLUSIVE": "yellow"}
PASS_THROUGH: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Runs the command line; a missing optional dependency becomes one sentence."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "telos":
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'telos[lab]'", 1)
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1)


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"telos: {message}", style="red", markup=False, soft_wrap=True)
    raise SystemExit(code)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"telos {telos.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------------------------------------------- list


@app.command("list")
def list_papers(
    implemented: Annotated[bool, typer.Option("--implemented", help="Only implemented methods.")] = False,
    golden: Annotated[
        bool, typer.Option("--golden", help="Only those checked against recorded values.")
    ] = False,
    verdict: Annotated[
        str, typer.Option(help="Only this verdict: reproduced, not-reproduced, inconclusive or none.")
    ] = "",
    search: Annotated[str, typer.Option(help="Only entries whose slug, title or names contain it.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the papers: what is implemented, golden-checked and reproduced."""
    wanted = verdict.upper().replace("-", " ").replace("_", " ")
    if wanted and wanted not in (*COLOURS, "NONE"):
        verdicts = ["reproduced", "not-reproduced", "inconclusive", "none"]
        _fail(f"there is no verdict {verdict!r}; {_catalogue.nearest(verdict, verdicts)}", 2)
    chosen = [
        paper
        for paper in _catalogue.papers()
        if (paper["implemented"] or not implemented)
        and (paper["golden"] or not golden)
        and (not wanted or (paper["verdict"] or "NONE") == wanted)
        and _mentions(paper, search)
    ]
    if as_json:
        _print_json([_row(paper) for paper in chosen])
        return
    table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("slug", no_wrap=True)
    table.add_column("code", no_wrap=True)
    table.add_column("golden", justify="right", no_wrap=True)
    table.add_column("evidence", no_wrap=True)
    table.add_column("title", overflow="ellipsis", no_wrap=True, ratio=1)
    for paper in chosen:
        table.add_row(
            str(paper["number"]),
            paper["slug"],
            "yes" if paper["implemented"] else "",
            str(paper["golden_cases"] or ""),
            _verdict(paper),
            Text(paper["title"]),
        )
    output.print(table)
    output.print(
        f"{len(chosen)} of {len(_catalogue.papers())} papers; `telos show SLUG` says more", style="dim"
    )


def _row(paper: dict[str, Any]) -> dict[str, Any]:
    keys = ("number", "slug", "title", "arxiv", "implemented", "golden", "golden_cases", "verdict")
    stale = bool(paper["evidence"] and paper["evidence"]["stale"])
    return {**{key: paper[key] for key in keys}, "stale": stale, "symbols": paper["symbols"]}


def _mentions(paper: dict[str, Any], text: str) -> bool:
    words = [paper["slug"], paper["title"], paper["arxiv"], *paper["symbols"], *paper["planned"]]
    return text.lower() in " ".join(words).lower()


def _verdict(paper: dict[str, Any]) -> Text:
    if paper["verdict"] is None:
        return Text("")
    stale = " (stale)" if paper["evidence"]["stale"] else ""
    return Text(paper["verdict"] + stale, style=COLOURS[paper["verdict"]])


# ---------------------------------------------------------------------------------------------------- show


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="SLUG_OR_SYMBOL")],
    as_json: JsonOption = False,
) -> None:
    """Show a method: its maths, defaults, when to use it, its evidence and how to import it."""
    try:
        kind, entry = _catalogue.find(name)
    except KeyError as error:
        _fail(error.args[0], 2)
    if kind == "symbol":
        if as_json:
            _print_json(entry)
        else:
            _show_symbol(entry)
        return
    names = [_catalogue.symbols()[path] for path in entry["symbols"]]
    if as_json:
        _print_json({**entry, "symbols": names})
        return
    _show_heading(entry)
    if not names:
        planned = f" It will be {', '.join(entry['planned'])}." if entry["planned"] else ""
        output.print(f"\nNot implemented yet.{planned}")
        return
    if entry["when"]:
        output.print(f"\n[bold]When to use it[/bold]\n{entry['when']}")
    _show_symbol(names[0])
    if names[1:]:
        output.print("\n[bold]Also[/bold]")
        for symbol in names[1:]:
            output.print(Text("  " + symbol["path"], style="cyan"))
            output.print(Padding(_first_sentence(symbol["doc"]), (0, 0, 0, 6)))
    if entry["planned"]:
        output.print(f"To come: {', '.join(entry['planned'])}", style="dim")
    _show_evidence(entry)


def _show_heading(paper: dict[str, Any]) -> None:
    doubt = "" if paper["arxiv_certain"] else " (id not certain)"
    lines = [
        Text(paper["title"], style="bold"),
        Text(f"paper {paper['number']}, {paper['slug']}, https://arxiv.org/abs/{paper['arxiv']}{doubt}"),
    ]
    if paper["golden"]:
        lines.append(Text(f"equal to {paper['golden_cases']} recorded golden cases"))
    output.print(Panel(Text("\n").join(lines), expand=False))


def _show_symbol(symbol: dict[str, Any]) -> None:
    parts = _catalogue.sections(symbol["doc"])
    output.print()
    output.print(Text(symbol["signature"], style="bold cyan"), soft_wrap=True)
    output.print(Text(symbol["import"], style="green"))
    output.print()
    output.print(_prose(parts.pop("")))
    tuned = {key: value for key, value in symbol["defaults"].items() if key not in COMMON}
    if tuned:
        output.print("\n[bold]Defaults[/bold]")
        table = Table(box=None, show_header=False, pad_edge=False)
        for key, value in tuned.items():
            searched = f"searched over {symbol['space'][key]}" if key in symbol["space"] else ""
            table.add_row("  " + key, value, Text(searched, style="dim"))
        output.print(table)
    for heading, text in parts.items():
        output.print(f"\n[bold]{heading}[/bold]")
        if heading.startswith("Example"):
            output.print(Text("\n".join("  " + line for line in text.splitlines())), soft_wrap=True)
        else:
            output.print(Padding(_prose(text), (0, 0, 0, 2)))


COMMON = {"class_weight", "sample_weight", "ignore_index", "reduction", "denominator", "generator"}
"""Arguments that every loss of a family shares; they are no hyper-parameters of a method."""


def _prose(text: str) -> Text:
    """Paragraphs and argument lists of a docstring, joined to wrap anew; indented formulas stay."""
    lines: list[str] = []
    literal = False
    for line in text.splitlines():
        literal = (literal and (not line or line.startswith(" "))) or bool(lines and lines[-1].endswith("::"))
        continues = lines and lines[-1] and line and not literal
        if continues and (line.startswith(" ") or not re.match(r"[\w*`, .()]+: ", line)):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    plain = re.sub(r":\w+:`~?([^`]+)`|``([^`]+)``", r"\1\2", "\n".join(lines))
    return Text(re.sub(r"::$", ":", plain, flags=re.MULTILINE))


def _first_sentence(doc: str) -> Text:
    return _prose(doc.partition("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".:"))


def _show_evidence(paper: dict[str, Any]) -> None:
    evidence = paper["evidence"]
    output.print("\n[bold]Evidence[/bold]")
    if evidence is None:
        output.print("No study yet.")
        return
    output.print(Text(evidence["claim"]))
    if evidence["verdict"] is None:
        output.print(f"No result recorded; run: telos verify {paper['slug']}")
        return
    if evidence["stale"]:
        output.print(
            f"STALE: the study changed after this result; run: telos verify {paper['slug']}", style="yellow"
        )
    _show_result({**evidence, "slug": paper["slug"]})


def _show_result(result: dict[str, Any]) -> None:
    output.print(Text(result["verdict"], style=f"bold {COLOURS[result['verdict']]}"), end=" ")
    output.print(f"({len(result['seeds'])} seeds, budget {result['budget']}, {result['wall_time']:.0f} s)")
    if result["verdict"] != "REPRODUCED":
        output.print(Text(result["reason"]))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("effect", overflow="fold")
    for column in ("needs >", "mean", "lower", "upper"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for effect in result["effects"]:
        name = effect["name"] if effect["required"] else f"{effect['name']} *"
        numbers = [_number(effect[key]) for key in ("threshold", "mean", "lower", "upper")]
        table.add_row(name, *numbers, Text(effect["verdict"], style=COLOURS[effect["verdict"]]))
    output.print(table)
    reported = "; * is reported only" if any(not effect["required"] for effect in result["effects"]) else ""
    output.print(f"lower and upper: one-sided 95 % bounds of the mean over seeds{reported}", style="dim")


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4g}"


# -------------------------------------------------------------------------------------------------- verify


@app.command()
def verify(
    name: Annotated[
        str, typer.Argument(metavar="[SLUG]", help="A slug, or package.module with a STUDY.")
    ] = "",
    run_all: Annotated[bool, typer.Option("--all", help="Every study; current results are kept.")] = False,
    budget: Annotated[str, typer.Option(help="smoke, small (minutes) or full (for a GPU).")] = "small",
    seeds: Annotated[int | None, typer.Option(help="How many seeds; 8, or 1 with smoke.")] = None,
    as_json: JsonOption = False,
    record: Annotated[bool, typer.Option("--record", help="Write the library's own result.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the result and its plot.")] = Path("evidence-results"),
    processes: Annotated[int, typer.Option(help="Seeds that run at a time.", min=1)] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every seed again.")] = False,
) -> None:
    """Run a paper's claim as a small experiment and say whether it is reproduced."""
    from telos.evidence import _verify

    if bool(name) == run_all:
        _fail("give a slug or --all", 2)
    names = _verify.study_names() if run_all else [name]
    results, failures = [], []
    for study in names:
        try:
            with _progress(study) as progress:
                result, ran = _verify.verify(
                    study,
                    budget=budget,
                    seeds=seeds,
                    out=out,
                    record=record,
                    fresh=fresh,
                    processes=processes,
                    progress=progress,
                )
        except _verify.UsageError as error:
            _fail(str(error), 2)
        except _verify.VerifyError as error:
            failures.append(str(error))
            errors.print(f"telos: {error}", style="red", markup=False)
            continue
        except KeyboardInterrupt:
            _fail("interrupted; finished seeds are kept and the same command goes on from there", 130)
        results.append(result)
        if not as_json:
            output.print()
            output.print(Text(f"{result['slug']}: {result['claim']}"))
            _show_result(result)
            if not ran:
                output.print("a current result was there; --fresh runs it again", style="dim")
    if as_json:
        _print_json(results if run_all else results[0] if results else None)
    else:
        output.print(f"\nnumbers and plots: {out}", style="dim")
    if failures:
        raise SystemExit(1)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over seeds on the error stream, so that ``--json`` stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ----------------------------------------------------------------------------------------------------- lab


@app.command(context_settings=PASS_THROUGH)
def compare(context: typer.Context) -> None:
    """Compare objectives on your data: telos compare reviews.csv target=label loss=cross_entropy,focal.

    The words are a task (a built-in name, a CSV or Parquet file, a NumPy archive, a folder of images,
    package.module:Task, several separated by commas, or a TOML file from telos init), words about the data
    (target=, group=, time=, test=, model=, ...), loss=A,B,... and, if wanted, optim=, seeds=, trials=,
    tuning_seeds=, epochs=, metric=, band=, max_time=, reference=, processes=, engine=, out=, store=, --dry-run,
    --json, --quiet. A comma list makes a grid; name:key=value fixes a hyper-parameter; "z_loss+0.1*focal" is
    a mixture. telos compare STORE --add loss=... adds recipes to a finished comparison.
    """
    from telos.lab import command

    raise typer.Exit(command.compare(context.args) or 0)


@app.command(context_settings=PASS_THROUGH)
def report(context: typer.Context) -> None:
    """Analyse a finished comparison again without training: telos report STORE [OUT].

    OUT is a folder, an .html file, or a table: .csv, .parquet, .tex or .md.
    """
    from telos.lab import command

    raise typer.Exit(command.report(context.args) or 0)


@app.command(context_settings=PASS_THROUGH)
def runs(context: typer.Context) -> None:
    """List, show or remove what a store holds: telos runs [STORE], telos runs show|remove KEY [STORE].

    KEY is the first letters of a run's or a comparison's key; --all lists tuning runs too, --runs removes a
    comparison's runs with it, --json prints JSON. Without STORE it is the newest under runs/.
    """
    from telos.lab import command

    raise typer.Exit(command.runs(context.args) or 0)


@app.command(context_settings=PASS_THROUGH)
def export(context: typer.Context) -> None:
    """Take a run home: telos export best|KEY [STORE] [OUT] writes its loss, a script and its weights.

    The script trains the run again without telos.lab, and the numbers are checked against the stored ones.
    """
    from telos.lab import command

    raise typer.Exit(command.export(context.args) or 0)


@app.command(context_settings=PASS_THROUGH)
def init(context: typer.Context) -> None:
    """Write a commented TOML file of a comparison: telos init [FILE] [TASK WORDS...].

    telos compare FILE runs it.
    """
    from telos.lab import command

    raise typer.Exit(command.init(context.args) or 0)


if __name__ == "__main__":
    main()
