"""Replay protection of masked rounds: the stages begun and the sums agreed to, on the site's disk.

If a site answered a stage twice (two messages at once, a restart, memory restored from a copy), the
coordinator could get signatures for two survivor sets and open one site's update. If it had the
same work summed over two sets of sites, it would learn the difference of the two sums.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedgraft.common.secagg.errors import StageError
from fedgraft.common.secagg.statements import SecAggStage

__all__ = ["AgreedSums", "StageLog"]


class StageLog:
    """The stages begun in one session: a file with a line ``ROUND STAGE`` for each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, number: int, stage: SecAggStage) -> None:
        """Claim a stage: the claim is durable when this returns, and is never granted again.

        Raises:
            StageError: this stage, or a later one, was claimed before.
        """
        with _open_log(self._path) as (lines, append):
            latest = (0, 0)
            for first, second in lines:
                if first.isdecimal() and second in SecAggStage.__members__:
                    latest = max(latest, (int(first), SecAggStage[second].value))
            if (number, stage) <= latest:
                raise StageError("this stage of the round, or a later one, was served before")
            append(f"{number} {stage.name}")


class AgreedSums:
    """The sums that this site ever agreed to: a file with a line ``WORK SUM`` (hex) for each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, work: bytes, total: bytes) -> None:
        """Agree that ``work`` is summed over the sites that ``total`` stands for, durably.

        Raises:
            StageError: this site agreed to another sum of the same work.
        """
        with _open_log(self._path) as (lines, append):
            agreed = {second for first, second in lines if first == work.hex()}
            if agreed - {total.hex()}:
                raise StageError("this work was summed before, over other sites")
            if not agreed:
                append(f"{work.hex()} {total.hex()}")


@contextmanager
def _open_log(path: Path) -> Iterator[tuple[list[tuple[str, str]], "_Append"]]:
    """Lock a file that only grows; yield its pairs, and a function that adds a line durably."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        file.seek(0)
        text = file.read()
        # Text after the last line end was torn by a power cut; its stage was never answered.
        file.truncate(text.rfind(b"\n") + 1)
        whole = text.decode(errors="replace").split("\n")[:-1]
        lines = [(first, second) for first, _, second in (line.partition(" ") for line in whole)]
        yield lines, _Append(path, file, text)


class _Append:
    """Adds lines to an open log that holds ``text``."""

    def __init__(self, path: Path, file: IO[bytes], text: bytes) -> None:
        self._path, self._file, self._text = path, file, text

    def __call__(self, line: str) -> None:
        """Add one line; durable when this returns."""
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        for folder in () if self._text else self._path.parents[:2]:  # both may be new folders
            _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # the folder is not ours, so we did not make it
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
