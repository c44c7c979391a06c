"""The codec between typed payloads and Flower's records.

A payload (``payloads.py``) is sent as one Flower ``RecordDict`` with one ``ConfigRecord`` and, if
it has large arrays, one ``ArrayRecord``. The records are few and flat, because Flower moves every
nested object in a request of its own, and each array is two objects. Small arrays are in the
``ConfigRecord``. Arrays are sent as plain numpy (pickles are refused), so the dtype is explicit.
Adapters are always float32, independent of a site's precision in training.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import GenericAlias
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

# By default Flower reports usage, looks for updates and installs packages.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedgraft.common.errors import MessageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "RecordDict",
    "Shared",
    "Stage",
    "array_hash",
    "arrays_in",
    "decode",
    "encode",
    "parts",
    "recall",
    "remember",
    "wire_bytes",
]

FORMAT = 2
# Largest array (bytes) in the payload's record. A separate array means three more objects, and each
# costs a request of 3 to 4 ms at the SuperLink, which passes on 50 MB/s.
SMALL = 512 * 1024
WORTH_KEEPING = 64 * 1024  # smallest array (bytes) that several messages share


class Stage(StrEnum):
    """A request and its reply in a round; the value is Flower's message type."""

    PLAN = "query.plan"
    KEYS = "query.keys"
    SHARES = "query.shares"
    TRAIN = "train"
    EVALUATE = "evaluate"
    CONFIRM = "query.confirm"
    UNMASK = "query.unmask"
    RESULT = "query.result"


T = TypeVar("T")
Shared = dict[int, tuple[NDArray[Any], Array]]  # by id(); the entry keeps its array alive


def encode(payload: "DataclassInstance", arrays: Shared | None = None) -> RecordDict:
    """Return the payload as a Flower record.

    Several calls can share ``arrays``. If their payloads contain the same arrays (by identity),
    each array is serialised only once.
    """
    shared = {} if arrays is None else arrays
    config: dict[str, Any] = {"kind": type(payload).__name__, "format": FORMAT}
    found: dict[str, Array] = {}
    for key, value in _flatten("", payload):
        if not isinstance(value, np.ndarray):
            config[key] = value
            continue
        array = shared[id(value)][1] if id(value) in shared else Array(value)
        if value.nbytes > WORTH_KEEPING:
            shared[id(value)] = (value, array)
        if value.nbytes <= SMALL:
            config[key] = array.data
        else:
            found[key] = array
    record = RecordDict({"payload": ConfigRecord(config)})
    if found:
        record["arrays"] = ArrayRecord(found)
    return record


def _flatten(prefix: str, payload: "DataclassInstance") -> Iterator[tuple[str, Any]]:
    """Yield fields with flat keys: ``outer.inner``.

    A tuple of dataclasses gives one list for each field.
    """
    for name, hint in _hints(type(payload)).items():
        key, value = prefix + name, getattr(payload, name)
        if is_dataclass(hint):
            yield from _flatten(f"{key}.", value)
        elif element := _dataclass_in(hint):
            for column in fields(element):
                yield f"{key}.{column.name}", [getattr(each, column.name) for each in value]
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def decode(record: RecordDict, *kinds: type[T]) -> T:
    """Return the payload in ``record``, which must be of one of ``kinds``.

    Raises:
        MessageError: another kind or format, or a field is missing, unknown or of another type.
    """
    config = record.config_records.get("payload")
    if config is None or set(record) - {"payload", "arrays"}:
        raise MessageError("a message has no payload record, or others beside it")
    values: dict[str, Any] = dict(config)
    name, version = values.pop("kind", None), values.pop("format", None)
    cls = next((kind for kind in kinds if kind.__name__ == name), None)
    if cls is None or type(version) is not int or version != FORMAT:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise MessageError(f"a message is not a {wanted} of format {FORMAT}")
    arrays = _read_arrays(record)
    if arrays.keys() & values.keys():
        raise MessageError(f"a {name} has a field twice")
    values.update(arrays)
    payload = _build(cls, "", values)
    if values:
        raise MessageError(f"a {name} has other fields than it should")
    return payload


def _build(cls: Callable[..., T], prefix: str, values: dict[str, Any]) -> T:
    """Return a ``cls`` from the flat keys of ``_flatten``, and remove these from ``values``."""
    found: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        key = prefix + name
        if isinstance(hint, type) and is_dataclass(hint):
            found[name] = _build(hint, f"{key}.", values)
        elif element := _dataclass_in(hint):
            parts = _hints(element).items()
            columns = [
                _take(values, f"{key}.{part}", GenericAlias(tuple, (kind, ...)))
                for part, kind in parts
            ]
            if len({len(column) for column in columns}) != 1:
                raise MessageError(f"{key} has lists of different lengths")
            found[name] = tuple(element(*row) for row in zip(*columns, strict=True))
        else:
            found[name] = _take(values, key, hint)
    return cls(**found)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the fields of a dataclass with their types, in order."""
    return get_type_hints(cls)


def _dataclass_in(hint: Any) -> Any:
    """Return ``X`` if ``hint`` is ``tuple[X, ...]`` of a dataclass X, else None."""
    arguments = get_args(hint)
    return arguments[0] if get_origin(hint) is tuple and is_dataclass(arguments[0]) else None


def _take(values: dict[str, Any], key: str, hint: Any) -> Any:
    """Return the value of ``key``, which must have the type ``hint``.

    The type is a scalar, a tuple of scalars, or an array.
    """
    value = values.pop(key, None)
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        if isinstance(value, list) and all(type(item) is kind for item in value):
            return tuple(value)
    elif hint in (str, int, float, bytes):
        if type(value) is hint:
            return value
    elif isinstance(value, np.ndarray):
        return value
    elif type(value) is bytes:
        return _read_small(value)
    raise MessageError(f"{key} is missing or has the wrong type")


def _read_small(data: bytes) -> NDArray[Any]:
    """Return the array in ``data``, which is a whole .npy file."""
    file = io.BytesIO(data)
    try:
        found: NDArray[Any] = np.load(file, allow_pickle=False)
    except Exception as error:  # hostile bytes make numpy raise many kinds of error
        raise MessageError(f"an array cannot be read ({type(error).__name__})") from None
    if not isinstance(found, np.ndarray) or file.read(1):
        raise MessageError("an array is not one array")
    return found


def _read_arrays(record: RecordDict) -> dict[str, NDArray[Any]]:
    arrays = record.array_records.get("arrays", {})
    try:
        return {key: array.numpy() for key, array in arrays.items()}
    except Exception as error:  # hostile bytes make numpy raise many kinds of error
        raise MessageError(f"an array cannot be read ({type(error).__name__})") from None


def remember(state: RecordDict, memory: "DataclassInstance | None") -> None:
    """Store ``memory`` in a node's ``state``, which Flower keeps in memory; None removes it."""
    state.pop("memory", None)
    if memory is not None:
        state["memory"] = encode(memory)["payload"]


def recall(state: RecordDict, kind: type[T]) -> T | None:
    """Return the memory that ``remember`` stored; None if there is none."""
    kept = state.get("memory")
    return None if kept is None else decode(RecordDict({"payload": kept}), kind)


def arrays_in(payload: "DataclassInstance") -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the arrays of a payload with their field's name: ``adapter`` or ``train.adapter``."""
    for name, value in _flatten("", payload):
        if isinstance(value, np.ndarray):
            yield name, value


def parts(record: RecordDict) -> Iterator[tuple[str, bytes]]:
    """Yield the serialised content of a record: ``NAME.npy`` for an array, ``NAME`` for the rest.

    ``numpy.load`` can open a zip file of these parts.
    """
    for group in record.array_records.values():
        for name, array in group.items():
            yield f"{name}.npy", array.data
    for name, config in record.config_records.items():
        yield name, config.deflate()


def wire_bytes(record: RecordDict) -> int:
    """Return the bytes of the record's serialised content, without Flower's envelope and hashes."""
    return sum(len(content) for _, content in parts(record))


def array_hash(*arrays: NDArray[Any]) -> str:
    """Return the SHA-256 (hex) over dtype, shape and bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
