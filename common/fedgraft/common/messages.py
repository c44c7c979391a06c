"""What coordinator and site say to each other: one typed payload per stage, and its codec.

A payload is a frozen dataclass of strings, numbers and arrays. On the wire it is one Flower
``RecordDict`` with one ``ConfigRecord`` and, if it has arrays, one ``ArrayRecord``: few, flat
records, because Flower moves every nested object in a request of its own. Arrays travel as plain
numpy (pickles refused), so the dtype is what it says; adapters are float32 whatever the precision
that a site trains in.
"""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, get_type_hints

# Flower reports usage, looks for updates and installs packages unless it is told not to.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedgraft.common.errors import MessageError

__all__ = [
    "EvaluateReply",
    "EvaluateRequest",
    "Payload",
    "PlanReply",
    "PlanRequest",
    "Refusal",
    "Stage",
    "TrainReply",
    "TrainRequest",
    "array_hash",
    "decode",
    "encode",
    "wire_bytes",
]

FORMAT = 1


class Stage(StrEnum):
    """A request and its reply inside a round; the value is Flower's message type."""

    PLAN = "query.plan"
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class PlanRequest:
    """Coordinator to site, once a session: will you take part in this job?

    ``job`` is ``Job.for_sites()`` as JSON; ``layout`` the fingerprint of the exchanged adapter;
    ``fixed`` the SHA-256 of the adapter tensors that are not exchanged but must be equal.
    """

    session: str
    job: str
    backbone: str
    layout: str
    names: tuple[str, ...]
    fixed: str


@dataclass(frozen=True)
class PlanReply:
    """The site takes part; ``site`` is its name, ``examples`` its training examples."""

    session: str
    site: str
    examples: int


@dataclass(frozen=True)
class TrainRequest:
    """Train from this adapter, float32 [layout size]; ``names`` are its tensors, all trained."""

    session: str
    round: int
    job: str
    names: tuple[str, ...]
    adapter: NDArray[Any]


@dataclass(frozen=True)
class TrainReply:
    """``update`` = trained minus received adapter, float32; ``loss`` the mean training loss."""

    session: str
    round: int
    layout: str
    examples: int
    loss: float
    update: NDArray[Any]


@dataclass(frozen=True)
class EvaluateRequest:
    """Evaluate this adapter on the site's ``split``: ``validation`` or ``test``."""

    session: str
    round: int
    job: str
    names: tuple[str, ...]
    split: str
    adapter: NDArray[Any]


@dataclass(frozen=True)
class EvaluateReply:
    """``tally`` is ``Tally.to_vector()``."""

    session: str
    round: int
    tally: NDArray[Any]


@dataclass(frozen=True)
class Refusal:
    """The site did not do it; ``code`` is a reason code or a class name, never a message's text."""

    session: str
    code: str


Payload = (
    PlanRequest | PlanReply | TrainRequest | TrainReply | EvaluateRequest | EvaluateReply | Refusal
)
T = TypeVar("T", bound=Payload)


def encode(payload: Payload) -> RecordDict:
    """The payload as a Flower record."""
    config: dict[str, Any] = {"kind": type(payload).__name__, "format": FORMAT}
    arrays: dict[str, Array] = {}
    for field in dataclasses.fields(payload):
        value = getattr(payload, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = Array(value)
        else:
            config[field.name] = list(value) if isinstance(value, tuple) else value
    record = RecordDict({"payload": ConfigRecord(config)})
    if arrays:
        record["arrays"] = ArrayRecord(arrays)
    return record


def decode(record: RecordDict, *kinds: type[T]) -> T:
    """Read a payload of one of ``kinds`` back.

    Raises:
        MessageError: another kind or format, a field missing, unknown or of the wrong type.
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
    values.update(_read_arrays(record))
    hints = get_type_hints(cls)
    if set(values) != set(hints):
        raise MessageError(f"a {name} has other fields than it should")
    return cls(**{key: _typed(f"{name}.{key}", values[key], hints[key]) for key in hints})


def _read_arrays(record: RecordDict) -> dict[str, NDArray[Any]]:
    arrays = record.array_records.get("arrays", {})
    try:
        return {key: array.numpy() for key, array in arrays.items()}
    except Exception as error:  # numpy raises many kinds over hostile bytes
        raise MessageError(f"an array cannot be read ({type(error).__name__})") from None


def _typed(where: str, value: Any, hint: Any) -> Any:
    if hint == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif hint in (str, int, float):
        if type(value) is hint:
            return value
    elif isinstance(value, np.ndarray):
        return value
    raise MessageError(f"{where} has the wrong type")


def wire_bytes(record: RecordDict) -> int:
    """Bytes of the record's content as it is serialised, without Flower's envelope and hashes."""
    arrays = (array for part in record.array_records.values() for array in part.values())
    configs = (part.deflate() for part in record.config_records.values())
    return sum(len(array.data) for array in arrays) + sum(len(config) for config in configs)


def array_hash(*arrays: NDArray[Any]) -> str:
    """SHA-256 (hex) over dtype, shape and bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
