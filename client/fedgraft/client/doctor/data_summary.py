"""A summary of the data in a file, folder or pattern, without any job: counts, no values.

In a CSV file without a header, the first row would be taken for column names. So they are shown
only if at least two of them are names that a job could ask for; if it is one, only that one is
shown. Names of label folders, and of files beside a missing file, are not shown either.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgraft.client.data.files import (
    READERS,
    column_names,
    find_sources,
    is_text,
)
from fedgraft.client.data.folders import label_files, walk
from fedgraft.common.errors import DataError
from fedgraft.common.tasks import TASKS

__all__ = ["Survey", "survey"]

# The default names of a job's columns.
DEFAULTS = tuple(
    dict.fromkeys(
        key for task in TASKS.values() for key in (task.content, task.beside) if key is not None
    )
)
CONTENTS = frozenset(task.content for task in TASKS.values())
MOST = 20  # column names that are shown


@dataclass(frozen=True)
class Survey:
    """A summary: ``state`` is ok, warn or fail; ``what`` was seen; ``hint`` is empty if ok."""

    state: str
    what: str
    hint: str = ""


@dataclass(frozen=True)
class _Seen:
    """The counts of one source.

    ``rows`` is the number of rows. ``columns`` are given only if they are certainly names;
    ``nameless`` says that none is one that a job asks for. ``lacking`` is the number of rows that
    lack a value.
    """

    rows: int
    columns: tuple[str, ...] = ()
    lacking: int = 0
    nameless: bool = False


def survey(place: str, columns: Mapping[str, str]) -> Survey:
    """Read everything at ``place``, a path as in ``data.train`` of ``site.toml``.

    ``columns`` maps the job's columns to this site's own, as ``data.columns`` does.
    """
    try:
        try:
            sources = find_sources(place)
        except DataError:  # its hint lists names beside it, which may be labels
            return Survey("fail", "is not there", "no such file: mend the path in site.toml")
        seen = [_look(source, columns) for source in sources]
    except DataError as error:
        return Survey("fail", "cannot be read", f"{error}: {error.hint}")
    except OSError as error:  # a folder on the way may be closed to this user
        return Survey("fail", "cannot be read", f"{error.strerror}: check owner and mode")
    return _summed(seen)


def _summed(seen: list[_Seen]) -> Survey:
    what = f"{sum(one.rows for one in seen):,} rows"
    names = dict.fromkeys(name for one in seen for name in one.columns)
    if names:
        what += f" ({_listed(list(names))})"
    if lacking := sum(one.lacking for one in seen):
        hint = "fill them in or remove those rows: a job stops at the first"
        return Survey("warn", f"{what}, {lacking:,} of them empty in a column", hint)
    if any(one.nameless for one in seen):
        hint = "no column has a name that a job asks for: is there a header? else map them"
        return Survey("warn", what, f"{hint} in [data.columns]")
    return Survey("ok", what)


def _listed(names: list[str]) -> str:
    """Return the names on one line; a name that a terminal would not show as it is, is escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:MOST]]
    return ", ".join(shown) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def _look(source: Path, columns: Mapping[str, str]) -> _Seen:
    if source.is_dir():
        return _files(_examples_in(source))
    if source.suffix.lower() not in READERS:
        return _files([source])
    return _table(source, columns)


def _examples_in(folder: Path) -> list[Path]:
    """Return the files that are examples: texts, else those in label folders, else all files."""
    files = walk(folder).files
    texts = [file for file in files if is_text(file)]
    if len(texts) > len(files) / 2:  # a few beside images only describe them
        return texts
    return label_files(folder).files or files


def _files(paths: Sequence[Path]) -> _Seen:
    """Count files that may be read. Decoding is not tried: it takes as long as a round."""
    closed = sum(not os.access(path, os.R_OK) for path in paths)
    if not paths:
        raise DataError("no files", hint="put the site's files there")
    if closed:
        raise DataError(f"{closed:,} of {len(paths):,} files", hint="check owner and mode")
    return _Seen(len(paths))


def _table(source: Path, columns: Mapping[str, str]) -> _Seen:
    there = column_names(source)
    gone = sorted(set(columns.values()) - set(there))
    if gone:
        raise DataError(
            f"no column {gone[0]!r}, which [data.columns] maps", hint="mend [data.columns]"
        )
    wanted = {*columns.values(), *(set(DEFAULTS) - columns.keys())}
    known = [name for name in there if name in wanted]
    contents = {*columns.values(), *CONTENTS}
    several, counted = len(set(known)) > 1, Counter(there)
    sure = several or not contents.isdisjoint(known)
    twice = [name for name in known if counted[name] > 1]
    if sure and twice:
        raise DataError(f"there are two columns {twice[0]!r}", hint="rename one of them")
    single = [name for name in there if counted[name] == 1]
    if not single:
        raise DataError("no column has a name of its own", hint="is there a header?")
    content, label = (known if sure else single)[0], known[1] if several else None
    rows = lacking = 0
    for _, one, other in READERS[source.suffix.lower()](source, content, label):
        rows += 1
        lacking += sure and (_empty(one) or (label is not None and _empty(other)))
    if not rows:
        raise DataError("it has no rows", hint="put at least one row under the header")
    shown = there if several else known if sure else []
    return _Seen(rows, tuple(shown), lacking, nameless=not sure)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
