"""The documentation builds without a warning and shows every implemented method."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from telos import _catalogue

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)
IMPLEMENTED = [paper for paper in _catalogue.papers() if paper["implemented"]]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        str(folder / "trees"),
    ]
    ended = subprocess.run(
        [*build, str(ROOT / "docs"), str(folder / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "html"


def text_of(page: Path) -> str:
    """The text of a page without its markup."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def programs() -> list:
    """The blocks of Python in the guide that stand on their own: those that begin with an import."""
    return [
        pytest.param(block, id=f"{page.name}-{position}")
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for position, block in enumerate(FENCED.findall(page.read_text(encoding="utf-8")))
        if block.startswith(("import ", "from "))
    ]


@pytest.mark.parametrize("program", programs())
def test_programs_of_the_guide_run(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "guide", "exec"), {"__name__": "guide"})


@pytest.mark.slow
def test_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first program of the page writes the table that its commands use, one after another."""
    from typer.testing import CliRunner

    from telos.cli import app

    monkeypatch.chdir(tmp_path)
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("compare.md", "choose_loss.md")]
    exec(compile(FENCED.findall(pages[0])[0], "guide", "exec"), {"__name__": "guide"})
    commands = [
        line
        for page in pages
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("telos ")
    ]
    assert len(commands) == 9
    for command in commands:
        ended = CliRunner().invoke(app, shlex.split(command)[1:])
        assert ended.exit_code == 0, f"{command}: {ended.output}"
    assert (tmp_path / "exported" / "weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_every_implemented_method_has_a_page(html: Path) -> None:
    for paper in IMPLEMENTED:
        text = text_of(html / "reference" / f"{paper['slug']}.html")
        assert f"arXiv {paper['arxiv']}" in text
        assert f"equal to {paper['golden_cases']} recorded cases" in text or not paper["golden"]
        for path in paper["symbols"]:
            assert f"{path.rpartition('.')[2]}(" in text.replace(" (", "("), path
        if paper["evidence"]:
            assert f"telos verify {paper['slug']}" in text
        if paper["verdict"]:
            assert f"{paper['verdict']}: " in text


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_no_page_shows_raw_markup(html: Path) -> None:
    for page in (html / "reference").glob("*.html"):
        source = re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert ":func:`" not in source, page.name
        assert ":class:`" not in source, page.name


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_evidence_table_has_a_row_for_each_verdict(html: Path) -> None:
    text = text_of(html / "evidence.html")
    for paper in IMPLEMENTED:
        if paper["verdict"]:
            assert f"{paper['slug']} {' '.join(paper['evidence']['claim'].split())[:30]}" in text


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_guide_shows_the_code_that_is_in_the_library(html: Path) -> None:
    text = text_of(html / "write_a_loss.html")
    assert "def focal_loss(" in text
    assert "class FocalLoss(ClassificationLoss)" in text
    assert "STUDY" in text_of(html / "contributing.html")


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_gallery_links_to_whole_reports(html: Path) -> None:
    page = (html / "gallery.html").read_text(encoding="utf-8")
    recorded = sorted(path.name.partition(".")[0] for path in (ROOT / "docs" / "gallery").glob("*.gz"))
    assert recorded == sorted(path.stem for path in (html / "comparisons").glob("*.html"))
    for name in recorded:
        assert f"comparisons/{name}.html" in page
        report = (html / "comparisons" / f"{name}.html").read_text(encoding="utf-8")
        assert "<title>" in report
        assert len(report.encode()) < 6_000_000
