"""Hostile bytes in the place of an array are an error like any other, wherever they travel."""

import pickle
import struct
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrix import tries
from support.payload_samples import (
    LARGE,
    SAMPLES,
    VECTOR,
    forge,
    over_the_wire,
    parts,
    refuse,
    saved,
    zipped,
)

from fedgraft.common.errors import MessageError
from fedgraft.common.messages.codec import decode, encode
from fedgraft.common.messages.payloads import EvaluateReply, MaskedTrain, TrainReply


class Bomb:
    """Unpickling it raises what no decoder may let through."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def huge() -> bytes:
    """An array file whose header promises 400 TB."""
    honest, lie = b"'shape': (5,), }" + b" " * 14, b"'shape': (99999999999999,), } "
    data = saved(VECTOR)
    assert honest in data
    return data.replace(honest, lie)


def headed(header: str, data: bytes = VECTOR.tobytes(), version: int = 1) -> bytes:
    """An array file with this header."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + data


def described(descr: str, shape: str = "(5,)", data: bytes = VECTOR.tobytes()) -> bytes:
    """An array file whose header says this dtype and this shape."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"
    return headed(header, data)


WHOLE = saved(VECTOR)
HOSTILE_BYTES = {
    "nothing": b"",
    "garbage": b"garbage" * 20,
    "only magic": b"\x93NUMPY",
    "header cut short": WHOLE[:60],
    "no data": WHOLE[:128],
    "cut short": WHOLE[:-1],
    "large, cut short": saved(LARGE)[:-1],
    "pickle": pickle.dumps(Bomb()),
    "pickled objects": saved(np.array([Bomb()], object), allow_pickle=True),
    "zip": zipped(),
    "broken zip": zipped()[:60],
    "empty zip": b"PK\x05\x06" + bytes(18),
    "huge": huge(),
    "merely large": described("'<f4'", "(2000000000,)"),
    "more than can be counted": described("'<f4'", "(9223372036854775807, 9223372036854775807)"),
    "fewer than none": described("'<f4'", "(-5,)"),
    "shape of text": described("'<f4'", "('5',)"),
    "shape of truths": described("'<f4'", "(None,)"),
    "no dtype": described("''"),
    "a dtype that is none": described("'<f3'"),
    "dtype of a number": described("7"),
    "a wider dtype": described("'<f8'"),
    "objects": described("'|O'"),
    "objects in a row": described("[('a', '<f4'), ('b', '|O')]"),
    "code for a header": headed("__import__('os').abort()"),
    "a header of another kind": headed("[1, 2, 3]"),
    "a deep header": headed("(" * 5000 + ")" * 5000),
    "a version to come": headed("{}", version=9),
}
TRAILING = {
    "a byte more": WHOLE + b"\0",
    "another array": WHOLE + WHOLE,
    "a pickle behind": WHOLE + pickle.dumps(Bomb()),
    "less said than there is": described("'<f4'", "(4,)"),
    "a narrower dtype": described("'<f2'"),
    "data of nothing": described("'<f4'", "(0,)"),
}


def reply_with(data: bytes, place: str) -> Any:
    """A ``TrainReply`` with ``data`` for an update: in the payload's record, or beside it."""
    config, _ = parts(SAMPLES["TrainReply"])
    if place == "payload":
        return forge(config | {"update": data}, {})
    del config["update"]
    return forge(config, {"update": Array("float32", (5,), "numpy.ndarray", data)})


@pytest.mark.parametrize("place", ["payload", "arrays"])
def test_the_forger_itself_makes_good_replies(place: str) -> None:
    for array in (VECTOR, LARGE):
        read = decode(reply_with(saved(array), place), TrainReply)
        assert read.update.tobytes() == array.tobytes()
    assert decode(reply_with(described("'<f4'"), place), TrainReply).update.shape == (5,)


@pytest.mark.parametrize("place", ["payload", "arrays"])
@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_hostile_bytes_in_an_array_are_refused(name: str, place: str) -> None:
    record = reply_with(HOSTILE_BYTES[name], place)
    for each in (record, over_the_wire(record)):
        error = refuse(each, TrainReply)
        assert "update is missing or has the wrong type" in str(error) or "an array" in str(error)
        assert error.__cause__ is None  # numpy's words quote what was sent
        assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("name", TRAILING)
def test_bytes_behind_a_small_array_are_refused(name: str) -> None:
    assert str(refuse(reply_with(TRAILING[name], "payload"), TrainReply)) == (
        "an array is not one array"
    )


def test_hostile_bytes_deep_in_a_payload_are_refused() -> None:
    config, _ = parts(SAMPLES["MaskedTrain"])
    for data in (*HOSTILE_BYTES.values(), *TRAILING.values()):
        refuse(forge(config | {"train.adapter": data}, {}), MaskedTrain)


@pytest.mark.parametrize("descr", ["'>f4'", "'<f2'", "'|S4'", "'<U1'", "'<M8[s]'", "'|V4'"])
def test_a_dtype_is_what_the_array_says(descr: str) -> None:
    """Also one that nobody asked for: who uses an array looks at its dtype."""
    data = bytes(5 * np.dtype(descr.strip("'")).itemsize)
    read = decode(reply_with(described(descr, data=data), "payload"), TrainReply).update
    assert (read.dtype.str, read.shape) == (descr.strip("'"), (5,))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_after_a_valid_start_never_raise_anything_else(tail: bytes) -> None:
    for start in (b"", WHOLE[:10], zipped()[:30]):
        for place in ("payload", "arrays"):
            refuse(reply_with(start + tail, place), TrainReply)


@given(st.data())
@settings(deadline=None, max_examples=tries(300))
def test_whatever_is_changed_in_a_small_array_nothing_else_is_raised(data: st.DataObject) -> None:
    changed = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = decode(reply_with(bytes(changed), "payload"), TrainReply).update
    except MessageError:
        return
    assert read.nbytes <= len(changed)


@pytest.mark.parametrize("data", [WHOLE, saved(LARGE)])
def test_an_array_of_another_serialisation_is_refused(data: bytes) -> None:
    config, _ = parts(SAMPLES["large TrainReply"])
    array = Array("float32", (5,), "torch.tensor", data)
    assert "TypeError" in str(refuse(forge(config, {"update": array}), TrainReply))


@pytest.mark.parametrize("count", [1, 100_000])
def test_objects_cannot_even_be_sent(count: int) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        encode(EvaluateReply("s", 1, np.array([object()] * count)))
