"""Forged replies, reported to the coordinator's audit when a run finds them.

A run writes every reply that does not count to its events. Most of these replies come from a site
that is late or may not take part. A forged reply has another reason: someone who can reach the
SuperLink answers in place of another site, or sends an old reply again.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["FORGED", "ForgedReplies"]

FORGED = frozenset({"bad-seal", "another-sites-seal", "wrong-session", "wrong-round"})
PIECE = 1 << 20  # bytes of a run's events that are read at a time


class ForgedReplies:
    """Follows the events of the runs below ``runs``, from their present end."""

    def __init__(self, runs: Path, event: Callable[..., None]) -> None:
        self._runs, self._event = runs, event
        self._read = {path: path.stat().st_size for path in runs.glob("*/events.jsonl")}

    def tend(self, run: str) -> None:
        """Report the forged replies that ``run`` found since the last call."""
        path = self._runs / run / "events.jsonl"
        for line in self._lines(path):
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # a crash cut the line
                self._tell(run, json.loads(line))

    def _tell(self, run: str, event: dict[str, Any]) -> None:
        for site, reason in _lost(event):
            if reason in FORGED:
                where = {"run": run, "round": event.get("round", 0)}
                self._event("reply-refused", **where, site=site, code=reason)

    def _lines(self, path: Path) -> list[bytes]:
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            whole, end, _ = file.read(PIECE).rpartition(b"\n")
        self._read[path] = self._read.get(path, 0) + len(whole) + len(end)
        return whole.splitlines()


def _lost(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each site that an event names as not counted, and the reason."""
    lost = event["sites"] if event["event"] == "warning" else [event]
    for one in lost:
        if reason := one.get("reason"):
            yield one["site"], reason.removeprefix("evaluation: ")
