"""The lock of a folder: only one process works in the folder at a time."""

import fcntl
from pathlib import Path
from typing import IO

from fedgraft.common.errors import RunError

__all__ = ["lock_folder"]


def lock_folder(folder: Path) -> IO[str]:
    """Lock ``folder`` until the returned file is closed or this process ends.

    Raises:
        RunError: another process holds the lock.
    """
    file = (folder / "lock").open("w")
    try:
        # lockf, not flock: forked workers must not inherit the lock and hold it after our end
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunError(
            f"{folder} is in use by another process", hint="wait for it, or stop it first"
        ) from None
    return file
