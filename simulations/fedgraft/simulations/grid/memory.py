"""How much memory a simulation takes and how fast it goes, its worker processes included."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil

__all__ = ["Pace", "PeakMemory"]

INTERVAL = 0.5  # seconds between samples


class PeakMemory:
    """Samples this process and its descendants while it is entered; ``megabytes`` is the peak.

    ``now`` is the last sample.

    Counts proportional set size where the system has it (Linux), so that pages shared by forked
    workers count once; elsewhere resident set size, which counts them for each.
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
        """``done`` sites of the round under way have answered."""
        rate = done / max(time.monotonic() - self._began, 1e-3)
        return f"{done} sites  {self._speed(rate)}"

    def after(self, sites: int, seconds: float) -> str:
        """A round with ``sites`` sites is over; it took ``seconds``."""
        self._began = time.monotonic()
        self._rounds, self._left = self._rounds + 1, self._left - 1
        left = (self._began - self._started) / self._rounds * self._left
        minutes, rest = divmod(round(left), 60)
        told = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left"
        return f"{self._speed(sites / max(seconds, 1e-3))}  {told}"

    def _speed(self, rate: float) -> str:
        return f"{rate:.1f} sites/s  {self._memory.now:.0f} MB"


def _now() -> int:
    """Bytes held by this process and its descendants."""
    this = psutil.Process()
    total = 0
    for process in [this, *this.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(memory, "pss", memory.rss)
    return total
