"""Prints how many golden files have an adapter, so that a slug without one is counted and seen."""

import pytest

from tests.golden.adapters import find_adapter, golden_directory, slug_of


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    directory = golden_directory(config.getoption("--golden-dir"))
    slugs = [slug_of(path) for path in sorted(directory.glob("*.json"))]
    without = [slug for slug in slugs if find_adapter(slug) is None]
    line = f"golden: {len(slugs) - len(without)} of {len(slugs)} slugs have an adapter"
    terminalreporter.write_line(line + (f"; without: {', '.join(without)}" if without else ""))
