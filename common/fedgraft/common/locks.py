"""A folder in which one process works at a time."""

import fcntl
from pathlib import Path
from typing import IO

from fedgraft.common.errors import RunError

__all__ = ["lock_folder"]


def lock_folder(folder: Path) -> IO[str]:
    """Lock ``folder`` until the file that comes back is closed, or this process ends.

    Raises:
        RunError: another process holds it.
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
