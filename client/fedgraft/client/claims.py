"""Which stages of masked rounds this site has ever begun, on its disk, so that none begins twice.

A coordinator that could have a stage answered twice (two messages at once, a restart, memory
brought back from a copy) could have two survivor sets signed and open one site's update.
"""

import fcntl
import os
from pathlib import Path

from fedgraft.common.secagg.errors import StageError
from fedgraft.common.secagg.statements import Stage

__all__ = ["Claims"]


class Claims:
    """The claims of one session: a file with a line ``ROUND STAGE`` for each, oldest first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, number: int, stage: Stage) -> None:
        """Claim a stage: durable when this returns, and never granted a second time.

        Raises:
            StageError: this stage, or a later one, was claimed before.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            file.seek(0)
            text = file.read()
            if (number, stage) <= _last(text):
                raise StageError("this stage of the round, or a later one, was served before")
            # A line torn by a power cut was never answered; it must not swallow this one.
            torn = text and not text.endswith(b"\n")
            file.write(b"\n" * bool(torn) + f"{number} {stage.name}\n".encode())
            file.flush()
            os.fsync(file.fileno())
            for folder in self._path.parents[:2]:  # a file that is not found again claims nothing
                _sync_folder(folder)


def _last(text: bytes) -> tuple[int, int]:
    """The latest claim in the file; (0, 0) if there is none."""
    latest = (0, 0)
    for line in text.split(b"\n")[:-1]:
        number, _, name = line.partition(b" ")
        if number.isdigit() and name.decode(errors="replace") in Stage.__members__:
            latest = max(latest, (int(number), Stage[name.decode()].value))
    return latest


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
