"""Ranks for tests: three gloo processes that are started once, of which each call takes as many as it asks for.

Every call gets a process group of its own, so that a failure leaves nothing behind for the next one.
"""

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MOST = 3
_PATIENCE = 60.0  # seconds until a rank that waits for another gives up


class _Failure(NamedTuple):
    trace: str


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on every rank of a process group of ``world`` ranks; what each of them returned.

    The function is one of a module, not of another function, and reads its rank from ``torch.distributed``.
    """
    pipes = _processes()[:world]
    with tempfile.TemporaryDirectory() as folder:
        job = pickle.dumps((function, arguments, world, str(Path(folder) / "store")))
        answers = []
        try:
            for pipe in pipes:
                pipe.send_bytes(job)
            for pipe in pipes:
                if not pipe.poll(2 * _PATIENCE):
                    raise TimeoutError
                answers.append(pickle.loads(pipe.recv_bytes()))
        except (EOFError, OSError) as error:
            _processes.cache_clear()  # the next call starts new ones
            raise RuntimeError(f"a rank of {world} died, or did not answer in time") from error
    failures = [answer.trace for answer in answers if isinstance(answer, _Failure)]
    assert not failures, "\n".join(failures)
    return answers


@cache
def _processes() -> list[Connection]:
    """The processes, by this end of their pipes; each ends when that is closed."""
    # one process imports torch, and the ranks are its forks
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "telos.losses"])
    pipes = []
    for rank in range(MOST):
        here, there = context.Pipe()
        context.Process(target=_serve, args=(rank, there), daemon=True).start()
        there.close()
        pipes.append(here)
    return pipes


def _serve(rank: int, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):  # the tests have ended
            return
        pipe.send_bytes(pickle.dumps(_answer(rank, job)))


def _answer(rank: int, job: bytes) -> Any:
    torch.manual_seed(0)
    try:
        function, arguments, world, store = pickle.loads(job)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_PATIENCE),
        )
        answer = function(*arguments)
        dist.barrier()  # no rank may hang up while another still listens
        return answer
    except Exception:  # it is shown by the test that asked
        return _Failure(traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # the others notice, and do not wait for this rank
