"""Label cells to indices of the job's labels, without guesses."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import Reading

__all__ = ["head_usage", "label_index", "label_options", "nearest_label"]


def label_index(value: Any, reading: Reading, *, typed: bool) -> int:
    """Return the index of the job's label for ``value``: a name, a mapped name, or an index.

    In a source that is not ``typed``, digits can also be an index.

    Raises:
        DataError: there is no value, or the job does not know it.
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
    """Return the index that ``value`` is, or None."""
    if isinstance(value, int):
        return value if value >= 0 else None
    return int(value) if not typed and re.fullmatch(r"0|[1-9][0-9]{0,8}", value) else None


def nearest_label(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown label: the most similar label, or the list of labels."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return f"labels are {', '.join(known[:10])}{more}, or 0 to {len(known) - 1}"


def _shown(value: object) -> str:
    """Return a label for an error message, shortened: the column may in fact be the text column."""
    text = repr(value)
    return text if len(text) <= 42 else text[:40] + "..."


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """Return additions to a backbone's ``config.json`` for a head with one output per label.

    timm's configuration stores the number of labels separately.
    """
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
        "num_labels": len(labels),
    }


def head_usage(outputs: int) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` for a head with ``outputs`` that an adapter brings.

    The backbone's own head may have another number of outputs; the adapter's head replaces it.
    """
    return {"num_labels": outputs, "ignore_mismatched_sizes": True}
