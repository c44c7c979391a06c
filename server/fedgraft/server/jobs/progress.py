"""The progress of runs for an operator, read from the run folders while they grow.

A run that goes on after a fault cuts its metrics back to the last committed round and repeats the
rounds after it. The lines of an overview show the file as it is now. ``totals`` counts every round
since the coordinator started, also a repeated one, because its bytes were sent over the network.
Rounds from before the start are not counted, because a Prometheus counter starts at zero again.
"""

import json
import os
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fedgraft.server.jobs.queue import Jobs, Submitted

__all__ = ["SHOWN", "Overview", "Round", "RunFigures"]

SHOWN = 50  # runs, the newest
REASONS = 50  # different reasons that are counted separately
WARNINGS = 5
TAIL = 1 << 16  # bytes at the end of the events that are searched for warnings
PACE = 5  # rounds; the median of their seconds is the pace
OTHER = "other"


@dataclass(frozen=True)
class Round:
    """A committed round: bytes from (``up``) and to (``down``) sites, wall ``seconds``.

    ``reasons`` are the codes of the updates that did not count.
    """

    number: int
    up: int
    down: int
    seconds: float
    reasons: tuple[str, ...]


class RunFigures:
    """The rounds in a run's ``folder``; each ``read`` continues where the last one ended.

    ``rounds`` are the rounds in the metrics file, in order. ``warnings`` are the texts of the last
    few warnings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds: list[Round] = []
        self.warnings: list[str] = []
        self._done: dict[int, Round] = {}
        self._inode = self._offset = 0
        self._events = (0, 0)

    def read(self) -> list[Round]:
        """Read the new lines; return the rounds that were done since the last call."""
        self._read_warnings()
        found = self._read_rounds()
        self.rounds += found
        # A repeated round takes another time, so it differs from the first one.
        fresh = [each for each in found if self._done.get(each.number) != each]
        self._done |= {each.number: each for each in fresh}
        return fresh

    def _read_rounds(self) -> list[Round]:
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                inode, size = _identity(file.fileno())
                if inode != self._inode or size < self._offset:  # a cut makes a new file
                    self.rounds, self._inode, self._offset = [], inode, 0
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(end)
        return [each for line in _parse(whole) if (each := _round(line))]

    def _read_warnings(self) -> None:
        with suppress(OSError), (self.folder / "events.jsonl").open("rb") as file:
            found = _identity(file.fileno())
            if found == self._events:
                return
            self._events = found
            file.seek(max(found[1] - TAIL, 0))
            events = list(_parse(file.read()))
            said = [_warning(event) for event in events if event.get("event") == "warning"]
            self.warnings = said[-WARNINGS:]


class Overview:
    """An overview of the newest ``jobs``, whose runs are below ``runs``; it is thread-safe."""

    def __init__(self, jobs: Jobs, runs: Path) -> None:
        self._jobs, self._runs = jobs, runs
        self._figures: dict[str, RunFigures] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._up = self._down = 0
        self._dropped: Counter[str] = Counter()
        self.lines()
        self._up = self._down = 0  # earlier rounds are not counted
        self._dropped.clear()

    def lines(self) -> list[dict[str, Any]]:
        """Return one record per run, oldest first."""
        with self._lock:
            shown = self._jobs.all()[-SHOWN:]
            names = {one.name for one in shown}
            self._figures = {name: each for name, each in self._figures.items() if name in names}
            return [self._line(one) for one in shown]

    def totals(self) -> dict[str, dict[str, int]]:
        """Return bytes by direction and dropped updates by reason, as ``lines`` counted them."""
        with self._lock:
            return {"bytes": {"up": self._up, "down": self._down}, "dropped": dict(self._dropped)}

    def _line(self, one: Submitted) -> dict[str, Any]:
        figures = self._figures.setdefault(one.name, RunFigures(self._runs / one.name))
        for fresh in figures.read():
            self._count(fresh)
        rounds, of = figures.rounds, self._count_of(one.name)
        reasons = Counter(reason for each in rounds for reason in each.reasons)
        left = (of - len(rounds)) * pace(rounds) if rounds and of else None
        return {
            "run": one.name,
            "state": one.state,
            "why": one.why,
            "rounds": len(rounds),
            "of": of,
            "bytes_up": sum(each.up for each in rounds),
            "bytes_down": sum(each.down for each in rounds),
            "dropped": reasons.total(),
            "reasons": dict(reasons.most_common(REASONS)),
            "seconds": rounds[-1].seconds if rounds else None,
            "left": left if one.state == "running" else None,
            "warnings": figures.warnings,
        }

    def _count(self, fresh: Round) -> None:
        self._up += fresh.up
        self._down += fresh.down
        for reason in fresh.reasons:
            known = reason in self._dropped or len(self._dropped) < REASONS
            self._dropped[reason if known else OTHER] += 1

    def _count_of(self, name: str) -> int | None:
        """Return the number of rounds of a job; None if its file does not say."""
        if name not in self._counts:
            with suppress(OSError, ValueError, KeyError, TypeError):
                self._counts[name] = int(tomllib.loads(self._jobs.text(name))["rounds"]["count"])
        return self._counts.get(name)


def pace(rounds: list[Round]) -> float:
    """Return the median seconds of the last rounds; one slow round does not change it."""
    return median(each.seconds for each in rounds[-PACE:])


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size


def _parse(content: bytes) -> Iterator[Mapping[str, Any]]:
    """Yield the objects in JSON lines; skip incomplete lines."""
    for text in content.split(b"\n"):
        with suppress(ValueError, RecursionError):
            if isinstance(line := json.loads(text), dict):
                yield line


def _round(line: Mapping[str, Any]) -> Round | None:
    with suppress(KeyError, TypeError, ValueError):
        return Round(
            int(line["round"]),
            int(line["bytes_up"]),
            int(line["bytes_down"]),
            float(line["seconds"]),
            tuple(str(drop["reason"])[:80] for drop in line["dropped"]),
        )
    return None


def _warning(event: Mapping[str, Any]) -> str:
    sites = event.get("sites")
    named = [
        f"{each.get('site')} ({each.get('reason')})"
        for each in (sites if isinstance(sites, list) else [])
        if isinstance(each, dict)
    ]
    about = f": {', '.join(named[:10])}" if named else ""
    return f"{str(event.get('time'))[:19]} {event.get('what')}{about}"[:400]
