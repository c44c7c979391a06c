"""Files as they were when they were read, so that what was made of them is known to be of them.

A cache of this process asks ``Witness.holds`` before it gives away what it made of some files. The
answer costs one ``stat`` for each file. A file system notes the time of a change only so finely:
two writes within a few milliseconds can leave the same times and the same size. Therefore a file
that changed shortly before it was looked at is compared by its content, until it is older.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedgraft.common.files import hash_file

__all__ = ["Witness"]

TICK = 0.02  # seconds; clocks of file systems lag behind by that
FRESH = 2.0  # seconds; FAT notes times by two seconds, other file systems more finely


@dataclass(frozen=True)
class _Look:
    """A file at one moment; ``content`` is its SHA-256, or a folder's names, if fresh then."""

    signature: tuple[int, ...] | None
    content: str | None = None


class Witness:
    """What ``paths`` were when this object was made. A path that is not there counts too.

    The content of a folder is the names of what lies in it. Files that were read before this object
    was made are known to be the same only if none changed ``since`` (Unix time) reading began.
    """

    def __init__(self, paths: Iterable[Path], *, since: float | None = None) -> None:
        self._seen = {path: _look(path) for path in dict.fromkeys(paths)}
        span = -math.inf if since is None else time.time() - since + TICK
        self._missed = any(_age(look.signature) < span for look in self._seen.values())

    @property
    def nbytes(self) -> int:
        """About the size in memory, in bytes."""
        return 400 * len(self._seen)

    def holds(self) -> bool:
        """Return whether every file still has the content that it had then."""
        if self._missed:
            return False
        for path, before in self._seen.items():
            signature = _signature(path)
            if signature != before.signature:
                return False
            if before.content is not None:
                old = not _fresh(signature)  # asked first: the file may change while it is read
                if _content(path) != before.content:
                    return False
                if old:  # from now on, every change gives it another signature
                    self._seen[path] = _Look(signature)
        return True


def _look(path: Path) -> _Look:
    signature = _signature(path)
    return _Look(signature, _content(path) if _fresh(signature) else None)


def _content(path: Path) -> str | None:
    """Return the SHA-256 of a file or a folder's names; None for what has no content to compare."""
    try:
        if path.is_dir():
            return "\0".join(sorted(entry.name for entry in path.iterdir()))
        return hash_file(path) if path.is_file() else None  # reading a pipe would wait for ever
    except OSError:
        return None


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return what tells a change of a file, links followed; None if nothing is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _fresh(signature: tuple[int, ...] | None) -> bool:
    return _age(signature) < FRESH


def _age(signature: tuple[int, ...] | None) -> float:
    """Return the seconds since the last change; infinite for what is not there."""
    return math.inf if signature is None else time.time() - signature[-1] / 1e9
