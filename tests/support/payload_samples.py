"""One payload of every kind, with small and with large arrays, and the tools to forge them."""

import dataclasses
import io
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedgraft.client.secagg.round_secrets import Memory
from fedgraft.common.errors import MessageError
from fedgraft.common.messages.codec import SMALL, decode, encode
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    PastRound,
    Payload,
    PlanReply,
    PlanRequest,
    Refusal,
    Reply,
    ResultReply,
    ResultRequest,
    SharesAsk,
    TrainReply,
    TrainRequest,
    UnmaskAsk,
    Work,
)
from fedgraft.common.secagg.quantize import Coding
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    Envelope,
    KeysRequest,
    MaskedInput,
    Opening,
    RevealedShare,
    SealedShares,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.common.secagg.transcript import Frame, Parameters

__all__ = [
    "COLUMNS",
    "EVALUATE",
    "KINDS",
    "LARGE",
    "MEMORY",
    "PLAIN",
    "REPLIES",
    "SAMPLES",
    "SEALED",
    "TRAIN",
    "VECTOR",
    "WORK",
    "Flat",
    "array_at",
    "assert_equal",
    "every_key",
    "forge",
    "over_the_wire",
    "parts",
    "refuse",
    "saved",
    "zipped",
]

Flat = Payload | Memory

VECTOR = np.arange(5, dtype=np.float32)
LARGE = np.arange(SMALL // 4 + 1, dtype=np.float32)  # too large for the payload's record
TRAIN = TrainRequest("s", 3, 1, "j", ("x",), VECTOR)
EVALUATE = EvaluateRequest("s", 3, "j", ("x",), "test", VECTOR)
ADVERTISED = (
    Advertisement(0, b"m0", b"s0", b"c0", b"signed 0"),
    Advertisement(2, b"m2", b"s2", b"c2", b"signed 2"),
)
WORK = Work("train", 3, 1, "train", "j", ("x",), b"adapter")
SEALED = (Envelope(0, 1, b"first"), Envelope(2, 1, b"second"))
MEMORY = Memory(
    parameters=Parameters(b"s" * 16, (0, 1, 4), b"l" * 32, 5, 1, 0, Coding(3, 0.5)),
    state=4,
    frame=Frame(b"context", 7, b"model"),
    seed=b"seed",
    mask_private=b"mask",
    seal_private=b"seal",
    own=ADVERTISED[0],
    advertised=(0, 1, 4),
    advertised_hash=b"all",
    neighbours=(1, 4),
    mask_keys=(b"m1", b"m4"),
    open_keys=(b"o1", b"o4"),
    owners=(0, 1, 4),
    shares=(b"x", b"y", b"z"),
    survivors=Survivors((0, 1, 4), (0, 4), (b"a", b"b")),
)
KINDS: tuple[type[Payload], ...] = get_args(Payload)
SAMPLES: dict[str, Flat] = {
    "PlanRequest": PlanRequest("s", "{}", "b", "l", ("x", "y"), "f"),
    "PlanReply": PlanReply("s", "site-1"),
    "TrainRequest": TRAIN,
    "TrainReply": TrainReply("s", 3, "l", 12, 0.5, VECTOR),
    "EvaluateRequest": EVALUATE,
    "EvaluateReply": EvaluateReply("s", 3, VECTOR.astype(np.float64)),
    "Refusal": Refusal("s", "DataError"),
    "KeysAsk": KeysAsk("s", WORK, (0, 1, 4), KeysRequest(9, b"c", b"m")),
    "SharesAsk": SharesAsk("s", SharesRequest(ADVERTISED)),
    "MaskedTrain": MaskedTrain(TRAIN, Delivery(SEALED)),
    "MaskedEvaluate": MaskedEvaluate(EVALUATE, Delivery(SEALED)),
    "ConfirmAsk": ConfirmAsk("s", Survivors((0, 1, 4), (0, 4), (b"a", b"b"))),
    "UnmaskAsk": UnmaskAsk("s", UnmaskRequest((Confirmation(0, b"a"), Confirmation(4, b"b")))),
    "ResultRequest": ResultRequest(
        *("s", 3, "run-1", "j", ("x",), 4),
        (PastRound(1, 4, 0.5, 0.25), PastRound(2, 3, 0.25, 0.5)),
        VECTOR,
    ),
    "ResultReply": ResultReply("s"),
    "Advertisement": ADVERTISED[1],
    "SealedShares": SealedShares(1, SEALED),
    "MaskedInput": MaskedInput(1, np.arange(9, dtype=np.uint8), b"signed"),
    "Confirmation": Confirmation(4, b"signature"),
    "Opening": Opening(1, (RevealedShare(0, b"seed"), RevealedShare(4, b"key"))),
    "Memory": MEMORY,
}


def _enlarged(value: Any) -> Any:
    """``value`` with large arrays for its small ones, of the same types."""
    if isinstance(value, np.ndarray):
        return np.resize(value, SMALL // value.itemsize + 1)
    if not dataclasses.is_dataclass(value) or isinstance(value, type | Memory):
        return value
    inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: _enlarged(each) for name, each in inner.items()})


WITH_ARRAYS = (
    "TrainRequest",
    "TrainReply",
    "EvaluateRequest",
    "EvaluateReply",
    "MaskedTrain",
    "MaskedEvaluate",
    "MaskedInput",
    "ResultRequest",
)
SAMPLES |= {f"large {name}": _enlarged(SAMPLES[name]) for name in WITH_ARRAYS}
REPLIES = [name for name, sample in SAMPLES.items() if isinstance(sample, get_args(Reply))]


def over_the_wire(record: RecordDict) -> RecordDict:
    """Through Flower's own protobuf bytes and back."""
    proto = recorddict_to_proto(record)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def assert_equal(left: object, right: object) -> None:
    """Equal, of equal types all the way down; arrays bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, tuple) and isinstance(right, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_equal(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


def parts(payload: Flat) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is inside of an encoded payload, to be tampered with."""
    record = encode(payload)
    return dict(record["payload"]), dict(record.array_records.get("arrays", {}))


def forge(config: dict[str, Any], arrays: dict[str, Array]) -> RecordDict:
    record = RecordDict({"payload": ConfigRecord(config)})
    if arrays:
        record["arrays"] = ArrayRecord(arrays)
    return record


def refuse(record: RecordDict, kind: type[Flat]) -> MessageError:
    with pytest.raises(MessageError) as caught:
        decode(record, kind)
    return caught.value


def array_at(payload: Flat, key: str) -> np.ndarray[Any, Any] | None:
    """The array that has the flat ``key``; None if something else has it."""
    value: Any = payload
    for part in key.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, np.ndarray) else None


def every_key() -> list[tuple[str, str]]:
    """Every flat key of every sample, by the sample's name."""
    found = []
    for name, sample in SAMPLES.items():
        config, arrays = parts(sample)
        chosen = [key for key in config if key not in ("kind", "format")]
        found += [(name, key) for key in chosen + list(arrays)]
    return found


PLAIN = [(name, key) for name, key in every_key() if array_at(SAMPLES[name], key) is None]
COLUMNS = [
    (name, key)
    for name, key in PLAIN
    if key.rpartition(".")[0].endswith(("advertisements", "envelopes", "confirmations", "shares"))
]


def saved(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def zipped() -> bytes:
    """An .npz file, which numpy reads where it is asked for an array."""
    buffer = io.BytesIO()
    np.savez(buffer, update=VECTOR)
    return buffer.getvalue()
