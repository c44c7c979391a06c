"""Files as they were when they were read, so that what was made of them is known to be of them.

A cache of this process asks ``Witness.holds`` before it gives away what it made of some files. The
answer costs one ``stat`` for each file. A file system notes the time of a change only so finely:
two writes within a few milliseconds can leave the same times and the same size. Therefore a file
that changed shortly before it was looked at is compared by its content, until it is older.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedgraft.common.files import hash_file

__all__ = ["Witness"]

FRESH = 2.0  # seconds; FAT notes times by two seconds, other file systems more finely


@dataclass(frozen=True)
class _Look:
    """A file at one moment; ``content`` is its SHA-256, or a folder's names, if fresh then."""

    signature: tuple[int, ...] | None
    content: str | None = None


class Witness:
    """What ``paths`` were when this object was made. A path that is not there counts too.

    The content of a folder is the names of what lies in it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._seen = {path: _look(path) for path in dict.fromkeys(paths)}

    @property
    def nbytes(self) -> int:
        """About the size in memory, in bytes."""
        return 400 * len(self._seen)

    def holds(self) -> bool:
        """Return whether every file still has the content that it had then."""
        for path, before in self._seen.items():
            if _signature(path) != before.signature:
                return False
            if before.content is not None:
                now = _look(path, digest=True)
                if now.content != before.content:
                    return False
                # Once a file is old, every later change gives it another signature.
                fresh = _fresh(now.signature)
                self._seen[path] = now if fresh else _Look(now.signature)
        return True


def _look(path: Path, *, digest: bool = False) -> _Look:
    signature = _signature(path)
    if signature is None or not (digest or _fresh(signature)):
        return _Look(signature)
    try:
        if path.is_dir():
            return _Look(signature, "\0".join(sorted(entry.name for entry in path.iterdir())))
        return _Look(signature, hash_file(path))
    except OSError:
        return _Look(None)


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return what tells a change of a file, links followed; None if nothing is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _fresh(signature: tuple[int, ...] | None) -> bool:
    return signature is not None and time.time() - signature[-1] / 1e9 < FRESH
