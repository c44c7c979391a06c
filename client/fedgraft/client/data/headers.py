"""The columns that a file has, and the ones that a job asks for."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from fedgraft.common.errors import DataError

__all__ = ["check_columns", "listed"]

LONGEST = 24  # characters of a name that is surely one


def check_columns(
    path: Path, there: Sequence[str], content: str, label: str | None, *, typed: bool
) -> None:
    """Check that a file has the columns ``content`` and ``label``, each once.

    The first line of a CSV file may be a row, if there is no header; then none of its cells may be
    repeated. A ``typed`` file has names, but they were perhaps made of a row: one that is no plain
    word is not repeated either.

    Raises:
        DataError: it has not.
    """
    wanted = [name for name in (content, label) if name is not None]
    twice = sorted({name for name in wanted if list(there).count(name) > 1})
    if twice:
        raise DataError(f"{path} has column {twice[0]!r} twice", hint="rename one of them")
    plain = typed and all(len(one) <= LONGEST and one.isidentifier() for one in there)
    certain = plain or any(one in there for one in wanted)
    for name in wanted:
        if name in there:
            continue
        if certain:
            raise DataError(
                f"{path} has no column {name!r}; its columns are: {listed(there)}",
                hint=_hint(name, there),
            )
        spelt = [one for one in there if one.strip().casefold() == name.casefold()]
        raise DataError(
            f"{path} has no column {name!r}: its first line has {len(there)} fields, and none has "
            "a name that this job asks for",
            hint=f"rename {spelt[0]!r} to {name!r}, or map it in [data.columns] of site.toml"
            if spelt  # it is the job's own word
            else f"is there a header? else {_hint(name, there, known=False)}",
        )


def _hint(name: str, there: Sequence[str], *, known: bool = True) -> str:
    if len(there) == 1 and any(mark in there[0] for mark in ";\t|"):
        return "separate the fields by commas"
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.5) if known else []
    folded = [other for other in there if other.strip().casefold() == name.casefold()]
    guess = f"did you mean {(folded or near)[0]!r}? " if folded or near else ""
    return f"{guess}map it in [data.columns] of site.toml, or name it in [data] of the job"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return at most ``most`` names for a message, long ones cut."""
    shown = ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
