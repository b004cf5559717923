"""Every golden case equals what the library computes.

``pytest tests/golden --golden-dir DIR`` runs the same adapters over any directory of such files. A slug without an
adapter is counted and shown, not failed: its method is not here yet.
"""

from pathlib import Path

import pytest

from tests.golden.adapters import Case, differences, find_adapter, read_cases

HERE = Path(__file__).parent
# Other people's float64 against ours: another order of summation, and here and there a constant such as 1e-10 that
# the source adds for safety.
RTOL, ATOL = 1e-8, 1e-10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        files = sorted(_directory(metafunc.config).glob("*.json"))
        metafunc.parametrize("golden_file", files, ids=[path.stem for path in files])
    if "case" in metafunc.fixturenames:
        cases = [
            case
            for path in sorted(_directory(metafunc.config).glob("*.json"))
            if find_adapter(path.stem)
            for case in read_cases(path)
        ]
        metafunc.parametrize("case", cases, ids=[f"{case.slug}-{case.name}" for case in cases])


def _directory(config: pytest.Config) -> Path:
    return Path(config.getoption("--golden-dir") or HERE)


def test_case(case: Case) -> None:
    adapter = find_adapter(case.slug)
    assert adapter is not None
    assert differences(adapter(case), case.expected, RTOL, ATOL, case.slug) == []


def test_file_is_read(golden_file: Path, record_property) -> None:
    """A file that cannot be read, or holds no case, is an error; a slug without an adapter is only counted."""
    cases = list(read_cases(golden_file))
    assert cases, f"{golden_file} holds no case"
    assert all(case.slug == golden_file.stem for case in cases)
    record_property("adapter", "yes" if find_adapter(golden_file.stem) else "no")


def test_own_files_have_adapters() -> None:
    missing = [path.stem for path in sorted(HERE.glob("*.json")) if find_adapter(path.stem) is None]
    assert missing == []
