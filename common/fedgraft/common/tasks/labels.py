"""Label cells to indices of the job's labels, without guesses."""

import difflib
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import Reading, composed, is_number

SHORT = 6  # characters of a label that is shown as it is: numbers and codes

__all__ = ["head_usage", "label_index", "label_options", "nearest_label"]


def label_index(value: Any, reading: Reading, *, typed: bool) -> int:
    """Return the index of the job's label for ``value``: a name, a mapped name, or an index.

    A number is an index only if no label of the job is a number and all labels of the split are
    indices: "1" can otherwise mean the second label or the label "1". In a source that is not
    ``typed``, digits can also be an index. Names are compared in Unicode's composed form (NFC).

    Raises:
        DataError: there is no value, the job does not know it, or names and indices are mixed.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise DataError("no label", hint="fill it in or remove the row")
    plain = isinstance(value, str | int) and not isinstance(value, bool)
    mapped = next((reading.mapped[key] for key in _keys(value) if key in reading.mapped), None)
    name = mapped if mapped is not None else composed(value) if plain else None
    if name in reading.indices:
        reading.take("names")
        return reading.indices[name]
    number = _number(value, typed=typed) if plain else None
    if number is not None and number < len(reading.labels) and not reading.numbered:
        reading.take("indices")
        return number
    known = "; the job's labels are numbers, so a number is a name" if reading.numbered else ""
    shown = _shown(value, reading.labels)
    key = repr(str(value)) if shown == repr(value) else "'VALUE'"
    raise DataError(
        f"label {shown} is not in the job's list{known}",
        hint=nearest_label(str(value), reading.labels)
        + f'; or map it in site.toml: [data.labels] {key} = "..."',
    )


def _keys(value: Any) -> tuple[str, ...]:
    """Return how ``[data.labels]`` of a site may write ``value``: true is written in two ways."""
    return (str(value), str(value).lower()) if isinstance(value, bool) else (composed(value),)


def _number(value: str | int, *, typed: bool) -> int | None:
    """Return the index that ``value`` is, or None."""
    if isinstance(value, int):
        return value if value >= 0 else None
    return int(value) if not typed and re.fullmatch(r"0|[1-9][0-9]{0,8}", value) else None


def nearest_label(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown label: the most similar label, or the list of labels."""
    same = [one for one in known if _visible(one) == _visible(name)]
    if same:
        return f"it differs from {same[0]!r} only in signs that are hard to see: {name!a}"
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    listed = f"labels are {', '.join(known[:10])}{more}"
    return listed if any(map(is_number, known)) else f"{listed}, or 0 to {len(known) - 1}"


def _visible(name: str) -> str:
    """Return a name without what a reader may not see: space, case, joiners, width of letters."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(one for one in folded if not one.isspace() and unicodedata.category(one) != "Cf")


def _shown(value: object, known: Sequence[str]) -> str:
    """Return a label for an error message: as it is if it is like a label of the job, or short.

    The column may in fact be one of texts or names of persons, and a log must hold none of them.
    """
    text = str(value)
    like = any(_visible(text) == _visible(one) for one in known)
    if like or len(text) <= SHORT or difflib.get_close_matches(text, known, n=1):
        return repr(value)
    return f"of {len(text)} characters"


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
