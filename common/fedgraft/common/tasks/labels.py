"""From what a site writes in its label column to the index of the job's label, guessing nothing."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import Reading

__all__ = ["label_index", "nearest_label"]


def label_index(value: Any, reading: Reading, *, typed: bool) -> int:
    """The index of the job's label that ``value`` means: a name, mapped or not, or an index.

    In a source that is not ``typed``, digits are a number, too.

    Raises:
        DataError: there is no value, or one that the job does not know.
    """
    if value is None or value == "":
        raise DataError("no label", hint="fill it in or remove the row")
    if isinstance(value, str | int) and not isinstance(value, bool):
        name = reading.mapping.get(str(value), str(value))
        if name in reading.indices:
            return reading.indices[name]
        number = _number(value, typed=typed)
        if number is not None and number < len(reading.labels):
            return number
    raise DataError(
        f"label {_shown(value)} is not in the job's list",
        hint=nearest_label(str(value), reading.labels)
        + f'; or map it in site.toml: [data.labels] {_shown(str(value))} = "..."',
    )


def _number(value: str | int, *, typed: bool) -> int | None:
    """The index that ``value`` writes."""
    if isinstance(value, int):
        return value if value >= 0 else None
    return int(value) if not typed and re.fullmatch(r"0|[1-9][0-9]{0,8}", value) else None


def nearest_label(name: str, known: Sequence[str]) -> str:
    """A hint for a label that is not known: the one that was probably meant, or what there is."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return f"labels are {', '.join(known[:10])}{more}, or 0 to {len(known) - 1}"


def _shown(value: object) -> str:
    """A label as an error shows it: short, in case the label column is really the text column."""
    text = repr(value)
    return text if len(text) <= 42 else text[:40] + "..."
