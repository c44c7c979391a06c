"""The files of a folder that are a site's data, and what systems have left beside them.

File managers, notebooks and storage boxes put folders of copies and files of their own everywhere.
They are left out at every depth and counted. A folder that the job lists as a label is never left
out. Links are followed; a link whose target is not here stays in the list, so that whoever opens it
says its name.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import composed

__all__ = ["LITTER", "SPECIAL", "Found", "is_litter", "is_special", "label_files", "walk"]

LITTER = "files of the system"
OUTSIDE = "files outside of the label folders"
SPECIAL = "pipes, sockets and devices"
LOOPS = "links to folders above them"
FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
FOLDERS = frozenset(
    {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
)


@dataclass
class Found:
    """Files in the order of their paths; ``left_out`` counts others by the reason."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def walk(folder: Path, *, within: Path | None = None) -> Found:
    """Return all files in ``folder`` and below it, sorted.

    A link back to ``folder`` is not followed, nor one back to ``within``, the folder above it.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = Found()
    above = tuple(_identity(one) for one in (within, folder) if one is not None)
    for path in _below(folder, above, found.left_out):
        found.files.append(path)
    found.files.sort()
    return found


def label_files(folder: Path, labels: Collection[str] = ()) -> Found:
    """Return the files in the folders of ``folder``, one for each label, folder by folder.

    A folder is data if it is one of ``labels``, also where its name is one that systems use.

    Raises:
        DataError: a folder cannot be listed, or a link to one points to nothing.
    """
    found, listed = Found(), {composed(label) for label in labels}
    for entry in _entries(folder):
        if not entry.is_dir():
            if entry.is_symlink() and not entry.exists():
                raise DataError(
                    f"{entry} is a link that points to nothing",
                    hint="is what it points to mounted here? or remove the link",
                )
            found.left_out[LITTER if is_litter(entry, folder=False) else OUTSIDE] += 1
            continue
        if is_litter(entry, folder=True) and composed(entry.name) not in listed:
            found.left_out[LITTER] += sum(1 for file in entry.rglob("*") if not file.is_dir())
            continue
        inside = walk(entry, within=folder)
        found.files += inside.files
        found.left_out += inside.left_out
    return found


def _below(
    folder: Path, above: tuple[tuple[int, int], ...], left_out: Counter[str]
) -> Iterator[Path]:
    """Yield files below ``folder``; ``above`` are the folders on the way, to notice loops."""
    for entry in _entries(folder):
        if not entry.is_dir():
            if is_litter(entry, folder=False):
                left_out[LITTER] += 1
            elif is_special(entry):
                left_out[SPECIAL] += 1
            else:
                yield entry
        elif is_litter(entry, folder=True):
            left_out[LITTER] += sum(1 for file in entry.rglob("*") if not file.is_dir())
        elif (place := _identity(entry)) in above:
            left_out[LOOPS] += 1
        else:
            yield from _below(entry, (*above, place), left_out)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed: {error.strerror}", hint="check its owner and mode"
        ) from None


def _identity(folder: Path) -> tuple[int, int]:
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino


def is_special(path: Path) -> bool:
    """Return whether a path is neither a file nor a folder: reading a pipe would wait for ever."""
    return path.exists() and not path.is_file() and not path.is_dir()


def is_litter(path: Path, *, folder: bool) -> bool:
    """Return whether a system made a file or folder of this name.

    Any other file that cannot be read needs a person, so it is not left out.
    """
    name = path.name.casefold()
    if name.startswith("."):
        return True
    return name.startswith("__") or name in FOLDERS if folder else name in FILES
