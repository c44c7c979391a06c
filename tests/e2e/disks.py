"""Disks that are soon full, for tests: file systems in memory, which only root may mount."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["filled", "small_disk", "why_not"]

BLOCK = 1 << 16


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Have ``folder`` be a disk of its own, of that size."""
    folder.mkdir(parents=True)
    options = f"size={megabytes}m,mode=0700"
    command = ["mount", "-t", "tmpfs", "-o", options, "fedgraft-test", str(folder)]
    subprocess.run(command, capture_output=True, check=True)
    try:
        yield
    finally:  # lazily: a process that is being killed may have a file open
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=True)


@contextmanager
def filled(folder: Path, *, left: int = 0) -> Iterator[None]:
    """Have only ``left`` bytes free where ``folder`` is."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (BLOCK, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
            file.truncate(file.tell() - left)
        yield
    finally:
        filler.unlink()


def why_not(folder: Path) -> str:
    """Why there can be no small disks here; empty if there can."""
    try:
        with small_disk(folder / "try", 1):
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "only root may mount file systems"
