"""Prints how many golden files have an adapter, so that a slug without one is counted and seen."""

from pathlib import Path

import pytest

from tests.golden.adapters import find_adapter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    directory = Path(config.getoption("--golden-dir") or Path(__file__).parent)
    slugs = [path.stem for path in sorted(directory.glob("*.json"))]
    without = [slug for slug in slugs if find_adapter(slug) is None]
    line = f"golden: {len(slugs) - len(without)} of {len(slugs)} slugs have an adapter"
    terminalreporter.write_line(line + (f"; without: {', '.join(without)}" if without else ""))
