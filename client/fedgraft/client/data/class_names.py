"""The names behind integers in a Parquet file of Hugging Face: ``ClassLabel`` columns."""

import json
from pathlib import Path
from typing import Any

from fedgraft.common.errors import DataError

__all__ = ["class_name", "class_names"]


def class_names(path: Path, schema: Any, label: str) -> list[str]:
    """Return the names behind the integers of a ``datasets.ClassLabel`` column.

    The column has an order of its own. Only its own entry in the metadata is read: other columns
    may be of kinds that this version does not know.

    Raises:
        DataError: the column holds integers, and the metadata that may name them is damaged.
    """
    import pyarrow as pa

    text, kind = (schema.metadata or {}).get(b"huggingface"), schema.field(label).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if text is None or not pa.types.is_integer(kind.value_type if lists else kind):
        return []
    try:
        feature = json.loads(text)["info"]["features"].get(label) or {}
        if lists:  # of tags; older versions of datasets write a list of one feature
            feature = feature[0] if isinstance(feature, list) else feature.get("feature") or {}
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else []
        return [str(name) for name in names or ()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} has damaged metadata of Hugging Face: what its integers mean is not known",
            hint="write the labels' names as text, or the file again",
        ) from None


def class_name(path: Path, row: int, names: list[str], value: Any) -> Any:
    """Return the name of a class, or of each in a list; -1 and an empty cell have no label."""
    if isinstance(value, list):
        return [class_name(path, row, names, one) for one in value]
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise DataError(
            f"{path}, row {row}: its label is {value}, and the file names {len(names)} classes",
            hint="write the file again with the names of all classes",
        )
    return names[value]
