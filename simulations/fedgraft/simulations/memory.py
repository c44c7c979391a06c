"""How much memory a simulation took, its worker processes included."""

import threading
from types import TracebackType
from typing import Self

import psutil

__all__ = ["PeakMemory"]

INTERVAL = 0.5  # seconds between samples


class PeakMemory:
    """Samples this process and its descendants while it is entered; ``megabytes`` is the peak.

    Counts proportional set size where the system has it (Linux), so that pages shared by forked
    workers count once; elsewhere resident set size, which counts them for each.
    """

    def __init__(self) -> None:
        self.megabytes = 0.0
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
            self.megabytes = max(self.megabytes, _now() / 2**20)
            if self._over.wait(INTERVAL):
                return


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
