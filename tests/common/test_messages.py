"""Every payload survives the wire, and nothing but a payload is taken for one."""

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgraft.common.errors import MessageError
from fedgraft.common.messages import Stage, array_hash, decode, encode, wire_bytes
from fedgraft.common.payloads import (
    EvaluateReply,
    EvaluateRequest,
    Payload,
    PlanReply,
    PlanRequest,
    Refusal,
    TrainReply,
    TrainRequest,
)

VECTOR = np.arange(5, dtype=np.float32)
SAMPLES: dict[str, Payload] = {
    "PlanRequest": PlanRequest("s", "{}", "b", "l", ("x", "y"), "f"),
    "PlanReply": PlanReply("s", "site-1"),
    "TrainRequest": TrainRequest("s", 3, "j", ("x",), VECTOR),
    "TrainReply": TrainReply("s", 3, "l", 12, 0.5, VECTOR),
    "EvaluateRequest": EvaluateRequest("s", 3, "j", ("x",), "test", VECTOR),
    "EvaluateReply": EvaluateReply("s", 3, VECTOR.astype(np.float64)),
    "Refusal": Refusal("s", "DataError"),
}
FIELDS = [(name, field.name) for name in SAMPLES for field in dataclasses.fields(SAMPLES[name])]


def over_the_wire(record: RecordDict) -> RecordDict:
    """Through Flower's own protobuf bytes and back."""
    proto = recorddict_to_proto(record)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def assert_equal(one: Payload, other: Payload) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()
        else:
            assert left == right
            assert type(left) is type(right)


def parts(payload: Payload) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is inside of an encoded payload, to be tampered with."""
    record = encode(payload)
    return dict(record["payload"]), dict(record.array_records.get("arrays", {}))


def forge(config: dict[str, Any], arrays: dict[str, Array]) -> RecordDict:
    record = RecordDict({"payload": ConfigRecord(config)})
    if arrays:
        record["arrays"] = ArrayRecord(arrays)
    return record


def refuse(record: RecordDict, kind: type[Payload]) -> MessageError:
    with pytest.raises(MessageError) as caught:
        decode(record, kind)
    return caught.value


def test_every_payload_has_a_sample() -> None:
    assert set(SAMPLES) == {kind.__name__ for kind in Payload.__args__}


def test_stages_are_message_types_of_flower() -> None:
    assert [str(stage) for stage in Stage] == ["query.plan", "train", "evaluate"]


# --- round trips

texts = st.text(max_size=20)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)
names = st.lists(texts, max_size=3).map(tuple)
vectors = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64]), hnp.array_shapes(min_side=0, max_dims=2)
)
payloads: st.SearchStrategy[Payload] = st.one_of(
    st.builds(PlanRequest, texts, texts, texts, texts, names, texts),
    st.builds(PlanReply, texts, texts, integers),
    st.builds(TrainRequest, texts, integers, texts, names, vectors),
    st.builds(TrainReply, texts, integers, texts, integers, floats, vectors),
    st.builds(EvaluateRequest, texts, integers, texts, names, texts, vectors),
    st.builds(EvaluateReply, texts, integers, vectors),
    st.builds(Refusal, texts, texts),
)


@given(payloads)
@settings(deadline=None)
def test_a_payload_comes_back_from_the_wire_as_it_was(payload: Payload) -> None:
    assert_equal(decode(over_the_wire(encode(payload)), type(payload)), payload)


@pytest.mark.parametrize("name", SAMPLES)
def test_each_kind_comes_back_from_the_wire(name: str) -> None:
    payload = SAMPLES[name]
    assert_equal(decode(over_the_wire(encode(payload)), type(payload)), payload)
    assert_equal(decode(encode(payload), type(payload)), payload)


def test_empty_strings_names_and_arrays_are_values_too() -> None:
    empty = np.zeros(0, np.float32)
    for payload in (
        PlanRequest("", "", "", "", (), ""),
        TrainRequest("", 0, "", (), empty),
        TrainReply("", 0, "", 0, 0.0, empty),
        EvaluateReply("", 0, np.zeros((0, 3))),
        Refusal("", ""),
    ):
        assert_equal(decode(over_the_wire(encode(payload)), type(payload)), payload)


def test_special_floats_travel_bit_for_bit() -> None:
    hard = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    payload = TrainReply("s", 1, "l", 1, float("inf"), hard)
    assert_equal(decode(over_the_wire(encode(payload)), TrainReply), payload)


def test_a_reply_may_be_one_of_several_kinds() -> None:
    assert isinstance(decode(encode(SAMPLES["Refusal"]), TrainReply, Refusal), Refusal)
    assert isinstance(decode(encode(SAMPLES["TrainReply"]), TrainReply, Refusal), TrainReply)


def test_a_record_is_one_config_and_at_most_one_array_record() -> None:
    assert list(encode(SAMPLES["TrainReply"])) == ["payload", "arrays"]
    assert list(encode(SAMPLES["Refusal"])) == ["payload"]


# --- hostile records


@pytest.mark.parametrize("name", SAMPLES)
def test_a_payload_of_another_kind_is_refused(name: str) -> None:
    others = [sample for other, sample in SAMPLES.items() if other != name]
    for other in others:
        error = refuse(encode(other), type(SAMPLES[name]))
        assert name in str(error)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_payload_of_another_format_is_refused(name: str, version: object) -> None:
    config, arrays = parts(SAMPLES[name])
    config["format"] = version
    if version is None:
        del config["format"]
    assert "format 1" in str(refuse(forge(config, arrays), type(SAMPLES[name])))


@pytest.mark.parametrize("kind", ["", "Payload", "MessageError", b"Refusal", ["Refusal"], 1])
def test_a_kind_that_is_none_is_refused(kind: Any) -> None:
    config, _ = parts(SAMPLES["Refusal"])
    refuse(forge(config | {"kind": kind}, {}), Refusal)
    del config["kind"]
    refuse(forge(config, {}), Refusal)


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_missing_field_is_refused(name: str, field: str) -> None:
    config, arrays = parts(SAMPLES[name])
    config.pop(field, None)
    arrays.pop(field, None)
    assert "other fields" in str(refuse(forge(config, arrays), type(SAMPLES[name])))


@pytest.mark.parametrize("name", SAMPLES)
def test_an_extra_field_is_refused(name: str) -> None:
    config, arrays = parts(SAMPLES[name])
    kind = type(SAMPLES[name])
    assert "other fields" in str(refuse(forge(config | {"more": 1}, arrays), kind))
    smuggled = arrays | {"more": Array(VECTOR)}
    assert "other fields" in str(refuse(forge(config, smuggled), kind))


@pytest.mark.parametrize(
    "extra", [ConfigRecord({"x": 1}), MetricRecord({"x": 1}), ArrayRecord({"x": Array(VECTOR)})]
)
def test_a_record_beside_the_payload_is_refused(
    extra: ConfigRecord | MetricRecord | ArrayRecord,
) -> None:
    record = encode(SAMPLES["Refusal"])
    record["smuggled"] = extra
    refuse(record, Refusal)


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_field_of_another_type_is_refused(name: str, field: str) -> None:
    config, arrays = parts(SAMPLES[name])
    right = config.get(field)
    lies: list[Any] = ["x", 1, 1.5, True, b"x", ["x"], [1], [b"x"]]
    lies = [lie for lie in lies if type(lie) is not type(right) or lie in ([1], [b"x"])]
    arrays.pop(field, None)
    for lie in lies:
        error = refuse(forge(config | {field: lie}, arrays), type(SAMPLES[name]))
        assert str(error) == f"{name}.{field} has the wrong type"


@pytest.mark.parametrize(
    ("name", "field"), [pair for pair in FIELDS if pair[1] not in ("adapter", "update", "tally")]
)
def test_an_array_in_the_place_of_a_plain_field_is_refused(name: str, field: str) -> None:
    config, arrays = parts(SAMPLES[name])
    del config[field]
    forged = forge(config, arrays | {field: Array(VECTOR)})
    assert "wrong type" in str(refuse(forged, type(SAMPLES[name])))


def test_a_message_without_a_payload_record_is_refused() -> None:
    assert "no payload" in str(refuse(RecordDict({}), Refusal))
    arrays = ArrayRecord({"update": Array(VECTOR)})
    assert "no payload" in str(refuse(RecordDict({"payload": arrays}), TrainReply))


def saved(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, update=VECTOR)
    return buffer.getvalue()


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


HOSTILE_BYTES = {
    "nothing": b"",
    "garbage": b"garbage" * 20,
    "only magic": b"\x93NUMPY",
    "cut short": saved(VECTOR)[:-1],
    "pickle": pickle.dumps(Bomb()),
    "pickled objects": saved(np.array([Bomb()], object), allow_pickle=True),
    "zip": zipped(),
    "broken zip": zipped()[:60],
    "huge": huge(),
}


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_hostile_bytes_in_an_array_are_refused(name: str) -> None:
    config, _ = parts(SAMPLES["TrainReply"])
    array = Array("float32", (5,), "numpy.ndarray", HOSTILE_BYTES[name])
    refuse(forge(config, {"update": array}), TrainReply)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_after_a_valid_start_never_raise_anything_else(tail: bytes) -> None:
    config, _ = parts(SAMPLES["TrainReply"])
    for start in (b"", saved(VECTOR)[:10], zipped()[:30]):
        array = Array("float32", (5,), "numpy.ndarray", start + tail)
        refuse(forge(config, {"update": array}), TrainReply)


def test_an_array_of_another_serialisation_is_refused() -> None:
    config, _ = parts(SAMPLES["TrainReply"])
    array = Array("float32", (5,), "torch.tensor", saved(VECTOR))
    refuse(forge(config, {"update": array}), TrainReply)


def test_objects_cannot_even_be_sent() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        encode(EvaluateReply("s", 1, np.array([object()])))


# --- sizes and hashes


@pytest.mark.parametrize("length", [0, 1, 1000, 100_000])
def test_wire_bytes_are_the_arrays_and_a_little(length: int) -> None:
    vector = np.zeros(length, np.float32)
    record = encode(TrainReply("s" * 32, 3, "l" * 64, 12, 0.5, vector))
    assert vector.nbytes + 128 <= wire_bytes(record) <= vector.nbytes + 700
    assert wire_bytes(over_the_wire(record)) == wire_bytes(record)


def test_wire_bytes_count_the_text_of_a_message_without_arrays() -> None:
    short, long = (wire_bytes(encode(Refusal("s", "x" * length))) for length in (10, 1010))
    assert 1000 <= long - short <= 1010


def test_the_hash_of_an_array_is_known() -> None:
    expected = hashlib.sha256(b"<f4 (2,)\n" + bytes(8)).hexdigest()
    assert array_hash(np.zeros(2, np.float32)) == expected


def test_hashes_tell_values_dtypes_shapes_borders_and_order_apart() -> None:
    zero = np.zeros(4, np.float32)
    variants: list[tuple[np.ndarray[Any, Any], ...]] = [
        (),
        (zero,),
        (zero[:2], zero[2:]),
        (zero[:1], zero[1:]),
        (zero.reshape(2, 2),),
        (np.zeros(2, np.float64),),
        (np.zeros(4, np.int32),),
        (np.array([0, 0, 0, 1], np.float32),),
        (np.array([-0.0, 0, 0, 0], np.float32),),
        (zero, zero[:0]),
        (np.array(0, np.float32),),
    ]
    assert len({array_hash(*arrays) for arrays in variants}) == len(variants)


def test_the_hash_does_not_depend_on_how_an_array_lies_in_memory() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert array_hash(array.T) == array_hash(array.T.copy())
    assert array_hash(array[:, ::2]) == array_hash(array[:, ::2].copy())


def test_flower_is_told_not_to_phone_home() -> None:
    """In a process that was told nothing, as a user's is; the tests' own has it set."""
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    code = (
        "import os, fedgraft.common.messages; "
        "print(*(os.environ[n] for n in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK', "
        "'FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=quiet, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1", "1"]
