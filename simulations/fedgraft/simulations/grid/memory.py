"""The memory and the speed of a simulation, including its worker processes."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil

__all__ = ["Pace", "PeakMemory"]

INTERVAL = 0.5  # seconds between samples


class PeakMemory:
    """Samples the memory of this process and its descendants in a context; in MiB.

    ``megabytes`` is the peak, ``now`` the last sample. On Linux it is the proportional set size,
    so that pages shared by forked workers count once. On other systems it is the resident set size,
    which counts these pages for each process.
    """

    def __init__(self) -> None:
        self.megabytes = self.now = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.now = _now() / 2**20
            self.megabytes = max(self.megabytes, self.now)
            if self._over.wait(INTERVAL):
                return


class Pace:
    """Sites per second, memory and the time left, for the line that shows progress."""

    def __init__(self, memory: PeakMemory, rounds: int) -> None:
        self._memory, self._left = memory, rounds
        self._started = self._began = time.monotonic()
        self._rounds = 0

    def within(self, done: int) -> str:
        """Return the text after ``done`` sites of the current round have answered."""
        rate = done / max(time.monotonic() - self._began, 1e-3)
        return f"{done} sites  {self._speed(rate)}"

    def after(self, sites: int, seconds: float) -> str:
        """Return the text after a round with ``sites`` sites, which took ``seconds``."""
        self._began = time.monotonic()
        self._rounds, self._left = self._rounds + 1, self._left - 1
        left = (self._began - self._started) / self._rounds * self._left
        minutes, rest = divmod(round(left), 60)
        told = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left"
        return f"{self._speed(sites / max(seconds, 1e-3))}  {told}"

    def _speed(self, rate: float) -> str:
        return f"{rate:.1f} sites/s  {self._memory.now:.0f} MB"


def _now() -> int:
    """Return the bytes of memory of this process and its descendants."""
    this = psutil.Process()
    total = 0
    for process in [this, *this.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(memory, "pss", memory.rss)
    return total
