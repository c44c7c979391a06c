"""Run tasks of one simulation in parallel, in forked processes that share the loaded backbone.

Each worker computes on one thread, in a forked process or in this process, so that a result never
depends on the number of workers.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from fedgraft.common.errors import RunError

__all__ = ["Workers", "cores"]

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Workers:
    """A pool of ``count`` forked processes; with 0, a task runs here when its result is requested.

    ``None`` means one process per core. Without safe forking, ``count`` becomes 0. Forking is safe
    on Linux on the CPU (a forked process cannot use a GPU that its parent has opened).
    """

    def __init__(self, count: int | None, *, device: str) -> None:
        forkable = sys.platform == "linux" and device == "cpu"
        self.count = count if count is not None else cores()
        if not forkable or self.count == 1:
            self.count = 0
        if device == "cpu":
            torch.set_num_threads(1)
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, task: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Start ``task(*arguments)`` and return its future, which also holds its exception."""
        if not self.count:
            return _Later(task, arguments)
        if self._pool is None:  # as late as possible: a fork shares everything loaded before it
            # The tokenizer's threads would not survive the fork, and would print long warnings.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            # Frozen objects stay shared: garbage collection in a worker would write to their pages.
            gc.collect()
            gc.freeze()
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(
                self.count,
                mp_context=context,
                initializer=_die_with_parent,
                initargs=(os.getpid(),),
            )
        return self._pool.submit(_tidily, task, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                "a worker process died; the system may have killed it for its memory",
                hint="resume the run on a machine with more memory, or start it with fewer workers",
            ) from None


class _Later(Future[T]):
    """A future that runs its task in this process when its result is first requested."""

    def __init__(self, task: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self._task, self._arguments = task, arguments

    def result(self, timeout: float | None = None) -> T:
        """Run the task if it is not done, and return its result."""
        if not self.done():
            try:
                self.set_result(self._task(*self._arguments))
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


def _tidily(task: Callable[..., T], *arguments: Any) -> T:
    """Run the task, then give its memory back to the system, and return the result.

    Batches differ in width. Otherwise the memory that the allocator keeps for the next batch would
    grow with every new width.
    """
    result = task(*arguments)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)
    return result


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this worker when its parent dies; only the parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
