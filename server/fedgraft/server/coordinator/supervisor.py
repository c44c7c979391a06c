"""Supervised processes: they are started again after they die, and end with the coordinator."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Supervised"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STEADY = 60.0  # seconds; a process that dies later did not fail to start
LONGEST = 30.0  # seconds between two starts
PATIENCE = 10.0  # seconds in which a process must end after it is asked to end


class Supervised:
    """One process of the coordinator; ``on_start`` is called after each start.

    Its output goes to ``log``. The logs of the last two starts are kept.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        log: Path,
        environment: Mapping[str, str],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.starts = 0
        self._command = command
        self._log = log
        self._environment = dict(environment)
        self._on_start = on_start
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._not_before = 0.0
        self._failures = 0

    @property
    def pid(self) -> int:
        """The process id; 0 while the process does not run."""
        process = self._process  # another thread may read this while the process is started again
        return process.pid if process and process.poll() is None else 0

    def tend(self) -> bool:
        """Start the process unless it runs or has just failed; return whether it was started."""
        now = time.monotonic()
        if self.pid:
            return False
        if self._process is not None:
            self._process = None
            self._failures = 0 if now - self._started > STEADY else self._failures + 1
            self._not_before = now + min(0.5 * 2 ** max(self._failures - 1, 0), LONGEST)
        if now < self._not_before:
            return False
        self._start()
        return True

    def _start(self) -> None:
        if self._log.exists():
            self._log.replace(self._log.with_suffix(".before.log"))
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  # our own commands
                list(self._command()),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.starts += 1
        self._started = time.monotonic()
        self._on_start()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self.pid:
            self._process.send_signal(number)  # type: ignore[union-attr]

    def stop(self) -> None:
        """End the process and the processes that it started."""
        if self._process is None:
            return
        group = self._process.pid
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(group, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
                break
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process = None


def _die_with_parent() -> None:
    # A coordinator that is killed with SIGKILL cannot end its processes, so the kernel does it. The
    # kernel sends SIGTERM, because an nginx that is killed with SIGKILL leaves its workers running.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
