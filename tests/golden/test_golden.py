"""Every golden case equals what the library computes.

``pytest tests/golden --golden-dir DIR`` runs the same adapters over any directory of such files. A slug without an
adapter is counted and shown, not failed: its method is not here yet.
"""

from pathlib import Path

import pytest
import torch

from tests.golden.adapters import Case, differences, find_adapter, golden_directory, read_cases, slug_of

HERE = Path(__file__).parent
# Other people's float64 against ours: another order of summation, and here and there a constant such as 1e-10 that
# the source adds for safety.
# Cases recorded in float32 can agree to its own accuracy only.
TOLERANCES = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-5, 1e-6)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        files = sorted(_directory(metafunc.config).glob("*.json"))
        metafunc.parametrize("golden_file", files, ids=[path.stem for path in files])
    if "case" in metafunc.fixturenames:
        cases = [
            case
            for path in sorted(_directory(metafunc.config).glob("*.json"))
            if find_adapter(slug_of(path))
            for case in read_cases(path)
        ]
        metafunc.parametrize("case", cases, ids=[f"{case.slug}-{case.name}" for case in cases])


def _directory(config: pytest.Config) -> Path:
    return golden_directory(config.getoption("--golden-dir"))


def test_case(case: Case) -> None:
    adapter = find_adapter(case.slug)
    assert adapter is not None
    rtol, atol = TOLERANCES[case.dtype]
    assert differences(adapter(case), case.expected, rtol, atol, case.slug) == []


def test_file_is_read(golden_file: Path, record_property) -> None:
    """A file that cannot be read, or holds no case, is an error; a slug without an adapter is only counted."""
    cases = list(read_cases(golden_file))
    assert cases, f"{golden_file} holds no case"
    record_property("adapter", "yes" if find_adapter(slug_of(golden_file)) else "no")


def test_own_files_have_adapters() -> None:
    missing = [path.stem for path in sorted(HERE.glob("*.json")) if find_adapter(path.stem) is None]
    assert missing == []
