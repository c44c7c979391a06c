"""Run tasks of one simulation side by side: forked processes that share the loaded backbone.

Each worker computes on one thread, in a forked process or in this one, so that a result never
depends on how many workers there were.
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
    """A pool of ``count`` forked processes; with 0, tasks run here when their result is asked for.

    ``None`` means one a core where forking is safe: on Linux, computing on the CPU (a forked
    process cannot use a GPU that its parent has opened).
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
        """Start ``task(*arguments)``; a task that fails fails its future."""
        if not self.count:
            return _Later(task, arguments)
        if self._pool is None:  # as late as possible: a fork shares all that is loaded by then
            # The tokenizer's own threads would not survive the fork, and say so at length.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            # What is here stays shared: a collection in a worker would write to all of its pages.
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
    """A future that does its task in this process, when its result is first asked for."""

    def __init__(self, task: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self._task, self._arguments = task, arguments

    def result(self, timeout: float | None = None) -> T:
        """Do the task if it is not done yet."""
        if not self.done():
            try:
                self.set_result(self._task(*self._arguments))
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


def _tidily(task: Callable[..., T], *arguments: Any) -> T:
    """Do the task, then give back the memory that it took: batches differ in width, and what the
    allocator holds back for the next one would grow with every kind that ever came."""
    result = task(*arguments)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    return result


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this worker when its parent dies, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
