"""Measure results while the site has nothing else to do.

To show whether federating was worth it, a site trains once more, alone, as long as it trained in
the federation. Therefore this is a process of its own at the lowest priority. It begins when no
message has come for a while, within the policy's hours, and it ends at once when a message comes.
An interrupted measurement begins again later; a failed one is left to a person.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from fedgraft.client.policy.policy_file import load_policy
from fedgraft.client.results.report import read_report
from fedgraft.client.results.store import Result, list_results
from fedgraft.client.site_config import load_site
from fedgraft.common.errors import FedgraftError

__all__ = ["IdleEvaluation"]

log = logging.getLogger("fedgraft.client")

QUIET = 20.0  # seconds without a message; pauses in a run are shorter
LOOK = 10.0  # seconds between two searches for results that are not measured
PATIENCE = 10.0  # seconds in which a process must end
NICE = 19


class IdleEvaluation:
    """Measures the results of the site whose ``site.toml`` is at ``site``."""

    def __init__(
        self, site: Path, state: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._site, self._state, self._clock = site, state, clock
        self._quiet_since = clock()
        self._looked = clock()
        self._process: subprocess.Popen[bytes] | None = None
        self._run = ""
        self._failed: set[str] = set()

    def interrupt(self) -> None:
        """Stop measuring, because there is a message."""
        self._quiet_since = self._clock()
        if self._process is None:
            return
        self._process.kill()  # its files are complete or absent
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        self._process = None

    def step(self) -> None:
        """Measure the oldest result that is not measured, or check whether measuring is done."""
        if self._process is not None:
            self._check_process(self._process)
            return
        now = self._clock()
        if now - self._quiet_since < QUIET or now - self._looked < LOOK:
            return
        self._looked = now
        try:
            waiting = self._waiting() if self._allowed() else None
        except FedgraftError as error:
            log.warning("results are not measured: %s", error)
            return
        if waiting:
            self._start(waiting.run)

    def _waiting(self) -> Result | None:
        for result in list_results(self._state):
            if result.run not in self._failed and read_report(result.folder) is None:
                return result
        return None

    def _allowed(self) -> bool:
        """Return whether the policy lets this site work now."""
        policy = load_site(self._site).policy
        hours = load_policy(Path(policy)).limits.hours if policy else None
        return hours is None or hours.include(datetime.now().time())

    def _start(self, run: str) -> None:
        self._run = run
        log.info("measuring %s: was it worth it for this site?", run)
        command = ["site", "results", run, "--measure", "--site", str(self._site)]
        self._process = subprocess.Popen(  # noqa: S603  # our own command, a checked name
            [sys.executable, "-m", "fedgraft", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with suppress(OSError):  # the process has already ended
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICE)

    def _check_process(self, process: subprocess.Popen[bytes]) -> None:
        code = process.poll()
        if code is None:
            return
        self._process = None
        if code == 0:
            log.info("%s is measured: fedgraft site results %s", self._run, self._run)
        else:
            self._failed.add(self._run)
            log.warning(
                "%s was not measured: fedgraft site results %s --measure says why",
                self._run,
                self._run,
            )
