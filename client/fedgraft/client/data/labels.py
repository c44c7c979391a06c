"""From what a site writes in its label column to the index of the job's label, guessing nothing."""

import difflib
import re
from collections.abc import Mapping, Sequence

from fedgraft.client.data.files import Table
from fedgraft.common.errors import DataError

__all__ = ["LabelIndex", "nearest_label"]


class LabelIndex:
    """From the value in a label column to the index of the job's label."""

    def __init__(self, names: Sequence[str], mapping: Mapping[str, str]) -> None:
        self._names = names
        self._mapping = mapping
        self._indices = {name: index for index, name in enumerate(names)}

    def of(self, table: Table, row: int) -> int:
        """The index of the label of ``row``.

        Raises:
            DataError: it has none, or one that the job does not know.
        """
        value = table.labels[row]
        if value is None or value == "":
            raise DataError(f"{table.place(row)} has no label", hint="fill it in or remove the row")
        if isinstance(value, str | int) and not isinstance(value, bool):
            name = self._mapping.get(str(value), str(value))
            number = _number(value, typed=table.typed)
            if name in self._indices:
                return self._indices[name]
            if number is not None and number < len(self._names):
                return number
        raise DataError(
            f"{table.place(row)}: label {_shown(value)} is not in the job's list",
            hint=nearest_label(str(value), self._names)
            + f'; or map it in site.toml: [data.labels] {_shown(str(value))} = "..."',
        )


def _number(value: str | int, *, typed: bool) -> int | None:
    """The index that ``value`` writes; in an untyped source digits are a number, too."""
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
