"""What a plan will launch, compiled side by side before it is made.

Where nothing is cached, Triton compiles a kernel at its first launch, 0.2 to 1.2 s each and one after another, and a plan
launches about two dozen. So the rooms that prove and time kernels are asked twice. The first time, in a *rehearsal*, launches
are noted and not made: results are whatever memory held, nobody looks at them, and every candidate is said to win. What was
noted is compiled by several threads. Then the plan is made, and finds its kernels.

Threads, not processes: Triton's compiler and the assembler run without the interpreter's lock, a process would first import
torch and the kernels for 3 to 4 s, and Triton's own lookup finds what a thread has compiled, whatever its keys are made of.

A rehearsal belongs to the thread that began it, and gradients are computed in that thread too: models in other threads run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

_MOST_THREADS = 8  # a tenth of compiling holds the interpreter's lock, so twice as many would gain a third at most
_log = logging.getLogger("oslo_fusion")


class Rehearsal:
    """Kernels that were noted, and the threads that compile them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, processors()), thread_name_prefix="oslo_fusion compiles")
        self._noted: dict[Hashable, Future[object]] = {}

    def note(self, key: Hashable, compile_it: Callable[[], object]) -> None:
        """Compile something beside, once for each key."""
        if key not in self._noted:
            self._noted[key] = self._pool.submit(compile_it)

    def finish(self) -> int:
        """Wait for what was noted, and say how many kernels it was. One that failed is compiled once more when it is launched,
        and fails there, where the plan has a row for it."""
        self._pool.shutdown(wait=True)
        for future in self._noted.values():
            error = future.exception()
            if error is not None:
                _log.info("a kernel could not be compiled before the plan: %s", error)
        return len(self._noted)

    def abandon(self) -> None:
        """Wait for what has begun, and begin nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Thread(threading.local):
    """What is under way in this thread. Every launch reads it, which takes 0.05 µs of the 8 and more that it has."""

    rehearsal: Rehearsal | None = None


THREAD = _Thread()


def under_way() -> bool:
    """Whether launches of this thread are noted and not made."""
    return THREAD.rehearsal is not None


@contextlib.contextmanager
def under(rehearsal: Rehearsal) -> Iterator[None]:
    """Note the launches of the body."""
    before, THREAD.rehearsal = THREAD.rehearsal, rehearsal
    try:
        # Else torch computes gradients on CUDA in a thread of its own, which would launch.
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        THREAD.rehearsal = before


def processors() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
