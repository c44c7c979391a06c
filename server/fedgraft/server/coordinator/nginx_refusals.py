"""What nginx refused at the public port, told to the coordinator's audit without flooding it.

Whoever can reach the port can make nginx write lines, so nothing here grows with them: a bounded
piece of the log is read at a time, what is alike in a minute becomes one event with a count, and
of what is not alike only the first few have events of their own. nginx's logs are moved away before
they are large; one older part of each is kept.

A second live session with a site's key is refused by the SuperLink with 412, and so is a site that
starts again within a minute after a crash. They differ in what comes after: the crashed session
ends by itself, while one that was there before the refusal and is still there ``PATIENCE`` later
belongs to a process that lives. Only that is an alarm. It does not say which of the two is the
site; and if the first session happens to end within that time, nothing tells this from a restart.
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
LARGE = 10_000_000  # bytes of a log that is moved away
WINDOW = 60.0  # seconds in which what is alike is one event
NAMED = 10  # events of one window, besides one a status for all others
PATIENCE = 90.0  # seconds: a session that died ends after 60 s without a heartbeat
CALM = 3600.0  # seconds between two alarms about one site
ACTIVATE = "/v1/fleet/activate-node"
SESSION_IS_THERE = 412
REFUSED = {400, 401, 403, 404, 413, 429}
GAVE_UP = {408, 499}  # the client went away: nobody refused it anything
SECOND = (
    "another session with this site's key was refused, and the one before it is alive: the site "
    "runs twice, or somebody else has its key"
)
Event = Callable[..., None]


@dataclass(frozen=True)
class RefusedRequest:
    """What makes two refusals alike. Without a valid ``certificate``, ``site`` is only claimed."""

    site: str
    status: int
    path: str
    certificate: str


class Tail:
    """Complete lines of a file that others append to, move away or truncate.

    ``position`` (inode and offset of an earlier reader) says where to begin if it fits.
    """

    def __init__(self, path: Path, position: tuple[int, int] = (0, 0)) -> None:
        self.path = path
        self._begin = position
        self._file: int | None = None
        self._inode = self._successor = 0
        self._offset, self._rest = 0, b""

    @property
    def position(self) -> tuple[int, int]:
        """Inode and offset up to which lines were given."""
        return self._inode, self._offset - len(self._rest)

    def read(self, limit: int) -> list[bytes]:
        """The lines in the next ``limit`` bytes; of one that is longer than that, some end."""
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
        """Go to the file that is in the place of ours, when ours was read to its end twice.

        Its writer may add to the one that was moved away until it hears of it.
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

    ``totals`` counts by status since the start, ``recent`` is what was told last, ``alarms`` when a
    site was last found to have two sessions; ``clock`` gives Unix time.
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
        self._doubts: dict[str, float] = {}  # when a site's session was first refused

    def tend(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Read on, and tell what is due.

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
        """Tell what was not told yet."""
        self._tell()
        self._tail.close()

    def _take(self, line: bytes) -> None:
        try:
            said = json.loads(line.decode("utf-8", "replace"))  # a path may be any bytes
            status, at = int(said["status"]), datetime.fromisoformat(said["time"]).timestamp()
            verify = _printable(said["verify"])
            refusal = RefusedRequest(_site(said["site"]), status, _printable(said["path"]), verify)
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # torn, or none of ours
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
            with suppress(OSError):  # then these lines are told again after a restart
                write_text(self._folder / "refused.json", json.dumps(self._tail.position))

    def _settle_doubts(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        now = self._clock()
        for site, since in list(self._doubts.items()):
            if now - since < PATIENCE:
                continue
            del self._doubts[site]
            node = nodes.get(site, {})
            # nginx writes whole seconds, so a session may seem to begin after its rival's refusal.
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
    """The site that a certificate's subject names; empty without a certificate."""
    return _printable(subject).removeprefix("CN=")[:64]


def _printable(text: str) -> str:
    """Harmless on a terminal, and short."""
    return "".join(char if "!" <= char <= "~" or char == " " else "?" for char in text[:120])
