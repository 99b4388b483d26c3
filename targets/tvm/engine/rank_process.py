"""Run one rank of a compiled model in a process of its own, and answer the calls of the process that started it."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing.connection
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from passopt.ir.errors import ModelError, PassoptError, UsageError
from passopt.targets.tvm.engine.engine import Engine
from passopt.targets.tvm.engine.shared_memory_collectives import Group
from passopt.targets.tvm.engine.virtual_machine import runtime


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments that the process of a rank is started with."""

    folder: Path
    rank: int
    degree: int
    threads: int
    verify_weights: bool
    copy_weights: bool
    timeout: float


def serve(pipe: multiprocessing.connection.Connection, job: Job, room: Path) -> None:
    """Load the library of a rank, then answer calls until the pipe ends.

    Args:
        pipe: Takes pairs (method, arguments), and gives back pairs (error, result), one of which is None.
        job: What to load, and how.
        room: The folder with the memory that all ranks share.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process, which ends the ranks.
    group = Group(room, job.rank, job.degree, job.timeout)

    def load() -> Engine:
        group.register(runtime())
        return Engine.load(
            job.folder,
            capacity=1,
            threads=job.threads,
            verify_weights=job.verify_weights,
            copy_weights=job.copy_weights,
            progress=functools.partial(group.counters.count_read, job.rank),
            alone=False,
        )

    error, engine = _tried(load, group)
    pipe.send((error, None))
    while error is None or isinstance(error, UsageError):
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        error, result = _tried(lambda: _answer(engine, job.rank, method, arguments), group)  # noqa: B023
        pipe.send((error, result))


def _answer(engine: Engine, rank: int, method: str, arguments: Sequence[Any]) -> Any:
    result = getattr(engine, method)(*arguments)
    if method == "allocate":
        return engine.batch, engine.capacity
    return result if rank == 0 else None  # All ranks have the same logits.


def _tried(action: Callable[[], Any], group: Group) -> tuple[PassoptError | None, Any]:
    """Run `action` and return (error, result), one of which is None.

    Any failure becomes an error that can be sent through a pipe; unexpected ones say which rank failed.
    """
    try:
        return None, action()
    except PassoptError as error:
        return group.failure or error, None
    except Exception as error:
        return group.failure or ModelError(f"rank {group.rank}: {type(error).__name__}: {error}"), None
