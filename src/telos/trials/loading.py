"""Data in a process: a task is loaded once, and its folds are kept as far as memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from telos.trials.tasks import Fold, Task, load_task

TASKS = 2
"""How many tasks a process holds on to."""
FOLD_BYTES = 512 * 2**20
"""How much memory the kept folds of a process may take."""


def task_of(spec: str, version: str) -> Task:
    """The task of a text, loaded once per process.

    Args:
        spec: see :func:`telos.trials.load_task`.
        version: hash of its data and code: what has changed is loaded anew.
    """
    if (spec, version) not in _tasks:
        keep_task(spec, version, load_task(spec))
    return _tasks[spec, version]


def keep_task(spec: str, version: str, task: Task) -> None:
    """Let :func:`task_of` return a task that was loaded elsewhere."""
    _tasks.pop((spec, version), None)
    _tasks[spec, version] = task
    while len(_tasks) > TASKS:
        del _tasks[next(iter(_tasks))]


def fold_of(spec: str, version: str, seed: int) -> Fold:
    """The fold of a task and a seed; those used last are kept."""
    task = task_of(spec, version)
    return _folds.get((spec, version, seed), lambda: task.fold(seed))


class Folds:
    """The folds used last, as many as fit into a number of bytes, and at least one.

    Example:
        >>> kept = Folds(limit=1)
        >>> for seed in (0, 1, 1):
        ...     _ = kept.get(seed, lambda: load_task("wine").fold(seed))
        >>> len(kept), kept.made
        (1, 2)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.made = 0
        self._kept: OrderedDict[Hashable, tuple[Fold, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Fold]) -> Fold:
        """The fold of a key, made if it is not kept."""
        if key not in self._kept:
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

            # what is fitted on the training split must not depend on the machine's number of cores
            with threadpool_limits(1):
                fold = make()
            self.made += 1
            self._kept[key] = fold, _bytes(fold)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self.limit:
            self._kept.popitem(last=False)
        return self._kept[key][0]


def _bytes(fold: Fold) -> int:
    splits = (fold.train, fold.validation, fold.test)
    return sum(values.nelement() * values.element_size() for split in splits for values in split.values())


_tasks: dict[tuple[str, str], Task] = {}
_folds = Folds(FOLD_BYTES)
