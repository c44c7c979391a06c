"""Write files completely or not at all, also if the machine stops during the write.

``lock_folder`` reserves a folder for one process at a time.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fedgraft.common.errors import RunError

__all__ = [
    "hash_file",
    "lock_folder",
    "sync_folder",
    "write_atomically",
    "write_private",
    "write_text",
]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then fsync and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new and renamed files in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, completely or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_private(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, completely or not at all; only this user can read it."""

    def write(temporary: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(content)

    write_atomically(path, write)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits; the file is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(folder: Path) -> IO[str]:
    """Lock ``folder`` and return the lock's file; the lock ends with the file or the process.

    Raises:
        RunError: another process has the lock.
    """
    file = (folder / "lock").open("w")
    try:
        # lockf, not flock: forked workers must not inherit it and outlive us with it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunError(
            f"{folder} is in use by another process", hint="wait for it, or stop it first"
        ) from None
    return file
