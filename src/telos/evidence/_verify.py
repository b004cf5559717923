"""Runs a study over its seeds, keeps what is finished, and writes the numbers, the verdict and a plot."""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import telos
from telos._catalogue import nearest
from telos.evidence._protocol import (
    BUDGETS,
    CONFIDENCE,
    INCONCLUSIVE,
    MINIMUM_SEEDS,
    SEEDS,
    Study,
    judge,
)

ROOM = Path(__file__).parent
RESULTS = ROOM / "results"

Result = dict[str, Any]
Progress = Callable[[int, int], None]


class VerifyError(RuntimeError):
    """A study that could not be run, in one sentence."""


class UsageError(VerifyError):
    """A run that cannot be as it was asked for: an unknown study or budget, too few seeds to record."""


def study_names() -> list[str]:
    """The slugs that have a study."""
    return sorted(path.stem for path in ROOM.glob("*.py") if not path.stem.startswith("_"))


def load_study(name: str) -> Study:
    """The study of a slug, or of any ``package.module`` that holds ``STUDY``."""
    if "." not in name and name not in study_names():
        raise UsageError(f"no study is called {name!r}; {nearest(name, study_names())}")
    try:
        study = importlib.import_module(_module(name)).STUDY
    except ModuleNotFoundError as error:
        if error.name is None or not _module(name).startswith(error.name):
            raise
        raise UsageError(f"there is no module {name!r} to hold a study") from None
    except AttributeError:
        raise UsageError(f"{name} holds no STUDY") from None
    return study


def source_hash(name: str) -> str:
    """The SHA-256 of the file that states and runs a study."""
    file = importlib.import_module(_module(name)).__file__
    if file is None:
        raise VerifyError(f"{name} has no source file to hash")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def verify(
    name: str,
    *,
    budget: str = "small",
    seeds: int | None = None,
    out: Path = Path("evidence-results"),
    record: bool = False,
    fresh: bool = False,
    processes: int = 2,
    progress: Progress | None = None,
) -> tuple[Result, bool]:
    """Runs one study, or reads its result if a current one is there.

    A result is current when the study's source, the budget and the versions of telos and torch are those of
    now; its seeds are then not run again. Every finished seed is kept at once (``out/NAME.partial.json``), so
    that an interrupted run goes on where it stopped.

    Args:
        name: slug, or ``package.module`` with a ``STUDY``.
        budget: ``"smoke"``, ``"small"`` or ``"full"``.
        seeds: how many seeds, from 100 on; 8, or 1 with the smoke budget, if not given.
        out: folder for ``NAME.json`` and ``NAME.png``.
        record: also write both into the library's own results.
        fresh: run every seed again.
        processes: how many seeds run at a time, each with one torch thread.
        progress: called with the number of finished seeds and of all seeds.

    Returns:
        The result, and whether anything was run for it.

    Raises:
        UsageError: for an unknown study or budget, or a run that cannot be recorded.
        VerifyError: if a seed raises or its process dies.
    """
    if budget not in BUDGETS:
        raise UsageError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    count = seeds if seeds is not None else 1 if budget == "smoke" else len(SEEDS)
    if count < 1:
        raise UsageError(f"seeds must be at least 1, got {count}")
    if record and (count < MINIMUM_SEEDS or budget == "smoke"):
        raise UsageError(
            f"a recorded result needs at least {MINIMUM_SEEDS} seeds and the budget small or full, "
            f"got {count} and {budget}"
        )
    if record and "." in name:
        raise UsageError("only the library's own studies are recorded in it")
    study = load_study(name)
    wanted = list(range(SEEDS.start, SEEDS.start + count))
    head = _head(name, study, budget)
    kept = {} if fresh else _kept_seeds(head, [out, RESULTS] if record else [out], name)
    todo = [seed for seed in wanted if seed not in kept]
    report = progress or (lambda finished, total: None)
    report(len(wanted) - len(todo), len(wanted))
    for finished, (seed, entry) in enumerate(_run_seeds(name, todo, budget, processes), 1):
        kept[seed] = entry
        _write_json(_partial(out, name), {**head, "runs": _runs(kept)})
        report(len(wanted) - len(todo) + finished, len(wanted))
    result = {**_result(head, study, {seed: kept[seed] for seed in wanted}), "runs": _runs(kept)}
    result = _to_json(result)
    for folder in [out, RESULTS] if record else [out]:
        _publish(result, folder, name)
    _partial(out, name).unlink(missing_ok=True)
    return result, bool(todo)


def _head(name: str, study: Study, budget: str) -> Result:
    """What a result says before its numbers."""
    import numpy
    import torch

    return {
        "slug": study.slug,
        "budget": budget,
        "claim": study.claim,
        "protocol": study.protocol,
        "decision": study.decision,
        "pilot": study.pilot,
        "source_sha256": source_hash(name),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.partition("+")[0],
            "numpy": numpy.__version__,
            "telos": telos.__version__,
        },
    }


def _result(head: Result, study: Study, done: dict[int, Result]) -> Result:
    numbers = [_from_json(entry["numbers"]) for entry in done.values()]
    verdict, reason, findings = judge(study, numbers)
    if head["budget"] == "smoke":
        verdict, reason = INCONCLUSIVE, "the smoke budget only shows that the study runs"
    effects = [
        {
            **asdict(found.effect),
            **{key: getattr(found, key) for key in ("mean", "sd", "n", "lower", "upper", "verdict")},
            "values": list(found.values),
        }
        for found in findings
    ]
    reported = sorted({key for row in numbers for key in row} - {effect.name for effect in study.effects})
    averages = {key: math.fsum(row.get(key, math.nan) for row in numbers) / len(numbers) for key in reported}
    return {
        **head,
        "verdict": verdict,
        "reason": reason,
        "confidence": CONFIDENCE,
        "seeds": list(done),
        "effects": effects,
        "values": averages,
        "wall_time": round(math.fsum(entry["seconds"] for entry in done.values()), 2),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _runs(done: dict[int, Result]) -> list[Result]:
    return [{"seed": seed, **done[seed]} for seed in sorted(done)]


# ------------------------------------------------------------------------------------------------- running


def _run_seeds(name: str, seeds: Sequence[int], budget: str, processes: int) -> Iterator[tuple[int, Result]]:
    """Runs seeds, each with one torch thread, and yields them as they finish."""
    workers = min(processes, len(seeds))
    if workers <= 1:
        for seed in seeds:
            yield seed, _run_seed(name, seed, budget)
        return
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_run_seed, name, seed, budget): seed for seed in seeds}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise VerifyError(f"a process that ran {name} was killed; finished seeds are kept") from None
        except BaseException:
            # do not wait for the seeds that are still running
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise


def _run_seed(name: str, seed: int, budget: str) -> Result:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        numbers = load_study(name).run(seed, budget)
    except Exception as error:
        raise VerifyError(f"seed {seed} of {name} raised {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    # JSON knows no infinity and no NaN: a number that is not finite becomes null and reads back as NaN
    values = {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}
    return {"numbers": values, "seconds": round(seconds, 3)}


def _start_worker() -> None:
    """Leaves Ctrl-C to the command, and ends the worker when the command is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _module(name: str) -> str:
    if "." not in name:
        return f"telos.evidence.{name}"
    if str(Path.cwd()) not in sys.path:  # a study of the user's own, as `python -m` would find it
        sys.path.append(str(Path.cwd()))
    return name


# ------------------------------------------------------------------------------------------------- keeping


def is_current(result: Result, head: Result) -> bool:
    """Whether seeds of ``result`` may stand beside seeds that are run now."""
    same = all(result.get(key) == head[key] for key in ("slug", "budget", "source_sha256"))
    versions = result.get("versions", {})
    return same and all(versions.get(key) == head["versions"][key] for key in ("torch", "telos"))


def _kept_seeds(head: Result, folders: Sequence[Path], name: str) -> dict[int, Result]:
    kept: dict[int, Result] = {}
    for folder in folders:
        for path in (_archive(folder, name, head["budget"]), folder / f"{name}.json", _partial(folder, name)):
            stored = _read_json(path)
            if stored is not None and is_current(stored, head):
                kept |= {
                    run["seed"]: {key: run[key] for key in ("numbers", "seconds")} for run in stored["runs"]
                }
    return kept


def _publish(result: Result, folder: Path, name: str) -> None:
    path = folder / f"{name}.json"
    stored = _read_json(path)
    plot = path.with_suffix(".png")
    undated = {key: value for key, value in result.items() if key != "date"}
    if stored is not None and plot.exists() and {**undated, "date": stored.get("date")} == stored:
        return
    if stored is not None and stored.get("budget") != result["budget"] and folder != RESULTS:
        path.replace(_archive(folder, name, stored.get("budget", "old")))
    from telos.evidence._plot import draw

    _write_json(path, result)
    draw(result, plot)


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.partial.json"


def _archive(folder: Path, name: str, budget: str) -> Path:
    """Where the result of another budget stays when a new one takes the plain name."""
    return folder / f"{name}.{budget}.json"


def _read_json(path: Path) -> Result | None:
    """A stored result; a file that cannot be read counts as none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _write_json(path: Path, content: Result) -> None:
    """Writes a file whole or not at all, so that a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(_to_json(content), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(numbers: dict[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in numbers.items()}
