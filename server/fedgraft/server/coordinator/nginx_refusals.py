"""Requests that nginx refused at the public port, reported to the coordinator's audit.

Everyone who can reach the port can make nginx write lines. Therefore the work and the events must
not grow with the lines. A bounded piece of the log is read at a time. Equal refusals in a minute
become one event with a count. Of different refusals, only the first few get their own events.
nginx's logs are moved away before they become large; one older part of each is kept.

The SuperLink refuses a second live session with a site's key with 412. It also refuses a site that
starts again within a minute after a crash. The two cases differ later: the crashed session ends by
itself. A session that began before the refusal and is still online ``PATIENCE`` later belongs to a
live process. Only this case is an alarm. The alarm does not say which of the two is the site. If
the first session happens to end within that time, the case cannot be told from a restart.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedgraft.common.files import write_text
from fedgraft.server.coordinator.nginx import ERRORS, LOG

__all__ = ["RefusedRequests", "Tail"]

PIECE = 1 << 20  # bytes of the log that are read at a time
LONGEST = 1 << 16  # bytes of a line
LARGE = 10_000_000  # bytes; a log of this size is moved away
WINDOW = 60.0  # seconds in which equal refusals are one event
NAMED = 10  # events of one window, besides one event per status for all others
PATIENCE = 90.0  # seconds: a session that died ends after 60 s without a heartbeat
CALM = 3600.0  # seconds between two alarms about one site
ACTIVATE = "/v1/fleet/activate-node"
SESSION_IS_THERE = 412
REFUSED = {400, 401, 403, 404, 413, 429}
GAVE_UP = {408, 499}  # the client went away; its request was not refused
SECOND = (
    "another session with this site's key was refused, and the one before it is alive: the site "
    "runs twice, or somebody else has its key"
)
Event = Callable[..., None]


@dataclass(frozen=True)
class RefusedRequest:
    """The facts that two equal refusals share.

    Without a valid ``certificate``, ``site`` is only claimed.
    """

    site: str
    status: int
    path: str
    certificate: str


class Tail:
    """Reads complete lines of a file that another process appends to, moves away or truncates.

    Reading begins at ``position`` (inode and offset of an earlier reader) if it fits the file.
    """

    def __init__(self, path: Path, position: tuple[int, int] = (0, 0)) -> None:
        self.path = path
        self._begin = position
        self._file: int | None = None
        self._inode = self._successor = 0
        self._offset, self._rest = 0, b""

    @property
    def position(self) -> tuple[int, int]:
        """Inode and offset of the end of the last line that ``read`` returned."""
        return self._inode, self._offset - len(self._rest)

    def read(self, limit: int) -> list[bytes]:
        """Return the lines in the next ``limit`` bytes; of a longer line, only an end part."""
        if self._file is None and not self._open():
            return []
        assert self._file is not None  # noqa: S101  # just opened
        if os.fstat(self._file).st_size < self._offset:  # truncated
            self._offset, self._rest = 0, b""
        data = os.pread(self._file, limit, self._offset)
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            self._rest = b""
        if not data:
            self._follow()
        return lines

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _open(self) -> bool:
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        found = os.fstat(self._file)
        inode, offset = self._begin
        fits = inode == found.st_ino and offset <= found.st_size
        self._inode, self._offset, self._rest = found.st_ino, offset if fits else 0, b""
        return True

    def _follow(self) -> None:
        """Go to the new file at ``path`` after the old file was read to its end twice.

        The writer may append to the moved file until it opens the new one.
        """
        with suppress(OSError):
            inode = self.path.stat().st_ino
            if inode not in (self._inode, self._successor):
                self._successor = inode
            elif inode != self._inode:
                self.close()
                self._open()


class RefusedRequests:
    """Follows the log in nginx's ``folder``; ``reopen`` makes nginx open its logs again.

    ``totals`` counts refusals by status since the start. ``recent`` holds the last reported events.
    ``alarms`` gives, by site, the last time at which it had two sessions. ``clock`` returns Unix
    time.
    """

    def __init__(
        self,
        folder: Path,
        event: Event,
        *,
        reopen: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.totals: Counter[str] = Counter()
        self.alarms: dict[str, float] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=NAMED)
        self._folder, self._event, self._reopen, self._clock = folder, event, reopen, clock
        self._tail = Tail(folder / LOG, _read_position(folder / "refused.json"))
        self._counts: Counter[RefusedRequest] = Counter()
        self._begun = 0.0
        self._doubts: dict[str, float] = {}  # by site, the time of the first refused session

    def tend(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Read the next lines, and report the events that are due.

        ``nodes`` has, by site, ``status`` and ``activated``, the Unix time at which its session
        began.
        """
        for line in self._tail.read(PIECE):
            self._take(line)
        if self._counts and self._clock() - self._begun >= WINDOW:
            self._tell()
        self._settle_doubts(nodes)
        self._rotate()

    def close(self) -> None:
        """Report the events that are not reported yet, and close the log."""
        self._tell()
        self._tail.close()

    def _take(self, line: bytes) -> None:
        try:
            said = json.loads(line.decode("utf-8", "replace"))  # a path may be any bytes
            status, at = int(said["status"]), datetime.fromisoformat(said["time"]).timestamp()
            verify = _printable(said["verify"])
            refusal = RefusedRequest(_site(said["site"]), status, _printable(said["path"]), verify)
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # an incomplete line, or not in our format
        if not 400 <= status < 500 or status in GAVE_UP:
            return
        self.totals[str(status)] += 1
        second = status == SESSION_IS_THERE and refusal.path == ACTIVATE
        if status in REFUSED or second:
            self._count(refusal)
        if second and verify == "SUCCESS":
            self._doubts.setdefault(refusal.site, at)

    def _count(self, refusal: RefusedRequest) -> None:
        if not self._counts:
            self._begun = self._clock()
        if refusal not in self._counts and len(self._counts) >= NAMED:
            refusal = RefusedRequest("", refusal.status, "(others)", "")
        self._counts[refusal] += 1

    def _tell(self) -> None:
        for refusal, count in self._counts.most_common():
            facts = {**vars(refusal), "count": count}
            self._event("refused", **facts)
            self.recent.append({"time": self._begun, **facts})
        self._counts.clear()
        if self._tail.position[0]:
            with suppress(OSError):  # then these lines are reported again after a restart
                write_text(self._folder / "refused.json", json.dumps(self._tail.position))

    def _settle_doubts(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        now = self._clock()
        for site, since in list(self._doubts.items()):
            if now - since < PATIENCE:
                continue
            del self._doubts[site]
            node = nodes.get(site, {})
            # nginx writes whole seconds, so the first session may seem to begin after the refusal.
            outlived = node.get("status") == "online" and node.get("activated", now) < since + 1
            if outlived and now - self.alarms.get(site, -CALM) >= CALM:
                self.alarms[site] = now
                self._event("second-session", site=site, what=SECOND)

    def _rotate(self) -> None:
        moved = [path for path in (self._tail.path, self._folder / ERRORS) if _move_large(path)]
        if moved:
            self._reopen()


def _move_large(path: Path) -> bool:
    with suppress(FileNotFoundError):
        if path.stat().st_size >= LARGE:
            path.replace(path.with_suffix(".before.log"))
            return True
    return False


def _read_position(path: Path) -> tuple[int, int]:
    try:
        inode, offset = json.loads(path.read_text(encoding="utf-8"))
        return int(inode), int(offset)
    except (OSError, ValueError, TypeError):
        return 0, 0


def _site(subject: str) -> str:
    """Return the site that a certificate's subject names; empty without a certificate."""
    return _printable(subject).removeprefix("CN=")[:64]


def _printable(text: str) -> str:
    """Return ``text`` with only characters that are harmless on a terminal, and cut it."""
    return "".join(char if "!" <= char <= "~" or char == " " else "?" for char in text[:120])
