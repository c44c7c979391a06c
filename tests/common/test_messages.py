"""Every payload survives the wire, and nothing but a payload is taken for one."""

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgraft.client.round_secrets import Memory
from fedgraft.common.errors import MessageError
from fedgraft.common.messages import (
    Shared,
    Stage,
    array_hash,
    decode,
    encode,
    recall,
    remember,
    wire_bytes,
)
from fedgraft.common.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    Payload,
    PlanReply,
    PlanRequest,
    Refusal,
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

Flat = Payload | Memory

VECTOR = np.arange(5, dtype=np.float32)
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
    "Advertisement": ADVERTISED[1],
    "SealedShares": SealedShares(1, SEALED),
    "MaskedInput": MaskedInput(1, np.arange(9, dtype=np.uint8), b"signed"),
    "Confirmation": Confirmation(4, b"signature"),
    "Opening": Opening(1, (RevealedShare(0, b"seed"), RevealedShare(4, b"key"))),
    "Memory": MEMORY,
}


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


def keys(*, plain: bool = True, arrays: bool = False) -> list[tuple[str, str]]:
    """Every flat key of every sample, by the sample's name."""
    found = []
    for name, sample in SAMPLES.items():
        config, tensors = parts(sample)
        chosen = [key for key in config if key not in ("kind", "format")] if plain else []
        found += [(name, key) for key in chosen + (list(tensors) if arrays else [])]
    return found


COLUMNS = [
    (name, key)
    for name, key in keys()
    if key.rpartition(".")[0].endswith(("advertisements", "envelopes", "confirmations", "shares"))
]


def test_every_payload_has_a_sample() -> None:
    assert set(SAMPLES) == {kind.__name__ for kind in KINDS} | {"Memory"}
    assert all(type(sample).__name__ == name for name, sample in SAMPLES.items())


def test_stages_are_message_types_of_flower() -> None:
    assert [str(stage) for stage in Stage] == [
        "query.plan",
        "query.keys",
        "query.shares",
        "train",
        "evaluate",
        "query.confirm",
        "query.unmask",
    ]


def test_nested_fields_are_flat_keys_and_tuples_of_dataclasses_are_columns() -> None:
    config, arrays = parts(SAMPLES["MaskedTrain"])
    assert config["kind"] == "MaskedTrain"
    assert config["train.round"] == 3
    assert config["train.names"] == ["x"]
    assert config["delivery.envelopes.sender"] == [0, 2]
    assert config["delivery.envelopes.ciphertext"] == [b"first", b"second"]
    assert list(arrays) == ["train.adapter"]


# --- round trips

texts = st.text(max_size=20)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)
vectors = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8]),
    hnp.array_shapes(min_side=0, max_dims=2),
)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    int: integers,
    float: floats,
    bytes: st.binary(max_size=20),
    Parameters: st.just(MEMORY.parameters),  # validates itself: not any numbers do
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    if hint in SCALARS:
        return SCALARS[hint]
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fields = {name: values(kind) for name, kind in get_type_hints(hint).items()}
        return st.builds(hint, **fields)
    assert get_origin(hint) is np.ndarray
    return vectors


@pytest.mark.parametrize("name", SAMPLES)
@given(st.data())
@settings(deadline=None, max_examples=25)
def test_a_payload_comes_back_from_the_wire_as_it_was(name: str, data: st.DataObject) -> None:
    kind = type(SAMPLES[name])
    payload = data.draw(values(kind))
    assert_equal(decode(over_the_wire(encode(payload)), kind), payload)


@pytest.mark.parametrize("name", SAMPLES)
def test_each_kind_comes_back_from_the_wire(name: str) -> None:
    payload = SAMPLES[name]
    assert_equal(decode(over_the_wire(encode(payload)), type(payload)), payload)
    assert_equal(decode(encode(payload), type(payload)), payload)


def test_empty_strings_names_lists_and_arrays_are_values_too() -> None:
    empty = np.zeros(0, np.float32)
    nothing = TrainRequest("", 0, 0, "", (), empty)
    payloads: tuple[Payload, ...] = (
        PlanRequest("", "", "", "", (), ""),
        nothing,
        TrainReply("", 0, "", 0, 0.0, empty),
        EvaluateReply("", 0, np.zeros((0, 3))),
        Refusal("", ""),
        KeysAsk("", Work("", 0, 0, "", "", (), b""), (), KeysRequest(0, b"", b"")),
        SharesAsk("", SharesRequest(())),
        MaskedTrain(nothing, Delivery(())),
        ConfirmAsk("", Survivors((), (), ())),
        MaskedInput(0, np.zeros(0, np.uint8), b""),
    )
    for payload in payloads:
        assert_equal(decode(over_the_wire(encode(payload)), type(payload)), payload)


def test_special_floats_travel_bit_for_bit() -> None:
    hard = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    payload = TrainReply("s", 1, "l", 1, float("inf"), hard)
    assert_equal(decode(over_the_wire(encode(payload)), TrainReply), payload)


@pytest.mark.parametrize("name", ["MaskedTrain", "MaskedEvaluate"])
def test_a_masked_request_names_its_session_as_every_request_does(name: str) -> None:
    request = SAMPLES[name]
    assert isinstance(request, MaskedTrain | MaskedEvaluate)
    assert request.session == "s"


# --- arrays that several payloads share


def test_an_array_that_payloads_share_is_serialised_once() -> None:
    shared: Shared = {}
    records = [encode(MaskedTrain(TRAIN, Delivery((each,))), shared) for each in SEALED]
    records.append(encode(TRAIN, shared))
    first = records[0]["arrays"]["train.adapter"].data
    assert records[1]["arrays"]["train.adapter"].data is first
    assert records[2]["arrays"]["adapter"].data is first
    for record, envelope in zip(records, SEALED, strict=False):  # the rest is each one's own
        assert decode(record, MaskedTrain).delivery.envelopes == (envelope,)


def test_calls_that_share_nothing_serialise_anew() -> None:
    one, other = encode(TRAIN), encode(TRAIN)
    assert one["arrays"]["adapter"].data is not other["arrays"]["adapter"].data


def test_arrays_are_never_mixed_up_when_memory_is_used_again() -> None:
    shared: Shared = {}
    records = [
        encode(dataclasses.replace(TRAIN, adapter=np.full(64, number, np.float32)), shared)
        for number in range(200)  # each is gone before the next is made
    ]
    for number, record in enumerate(records):
        assert set(decode(record, TrainRequest).adapter.tolist()) == {number}


# --- what a node remembers between messages


def test_a_memory_is_recalled_as_it_was() -> None:
    state = RecordDict({})
    remember(state, MEMORY)
    assert_equal(recall(over_the_wire(state), Memory), MEMORY)
    assert_equal(recall(state, Memory), MEMORY)  # and stays until it is dropped


def test_nothing_is_recalled_where_nothing_was_kept() -> None:
    assert recall(RecordDict({}), Memory) is None


def test_a_memory_that_is_dropped_leaves_no_secret_in_the_state() -> None:
    state = RecordDict({"other": ConfigRecord({"x": 1})})
    remember(state, MEMORY)
    remember(state, None)
    assert recall(state, Memory) is None
    assert list(state) == ["other"]
    remember(state, None)  # dropping nothing is no error


def test_only_the_latest_memory_is_kept() -> None:
    state = RecordDict({})
    remember(state, MEMORY)
    remember(state, dataclasses.replace(MEMORY, state=5, seed=b""))
    kept = recall(state, Memory)
    assert kept is not None
    assert (kept.state, kept.seed) == (5, b"")
    assert len(state) == 1


def test_something_else_is_not_recalled_as_a_memory() -> None:
    state = RecordDict({})
    remember(state, SAMPLES["Confirmation"])
    with pytest.raises(MessageError, match="not a Memory"):
        recall(state, Memory)


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


@pytest.mark.parametrize(("name", "key"), keys(arrays=True))
def test_a_missing_field_is_refused(name: str, key: str) -> None:
    config, arrays = parts(SAMPLES[name])
    config.pop(key, None)
    arrays.pop(key, None)
    error = refuse(forge(config, arrays), type(SAMPLES[name]))
    assert str(error) == f"{key} is missing or has the wrong type"


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


@pytest.mark.parametrize(("name", "key"), keys(arrays=True))
def test_an_extra_field_beside_any_field_is_refused(name: str, key: str) -> None:
    """Also one that a nested dataclass would be the only one to look at."""
    config, arrays = parts(SAMPLES[name])
    for more in (f"{key}.more", f"{key}_", key.rpartition(".")[0] + ".more"):
        forged = forge(config | {more: 1}, arrays)
        assert "other fields" in str(refuse(forged, type(SAMPLES[name])))


LIES: list[Any] = ["x", 1, 1.5, True, b"x", ["x"], [1], [1.5], [True], [b"x"]]


def types_of(value: Any) -> Any:
    """The type of a scalar, or of what is in a list."""
    return (list, *{type(item) for item in value}) if isinstance(value, list) else type(value)


@pytest.mark.parametrize(("name", "key"), keys(arrays=True))
def test_a_field_of_another_type_is_refused(name: str, key: str) -> None:
    config, arrays = parts(SAMPLES[name])
    right = types_of(config.get(key))
    lies = [lie for lie in LIES if types_of(lie) != right]
    arrays.pop(key, None)
    assert len(lies) >= len(LIES) - 1
    for lie in lies:
        error = refuse(forge(config | {key: lie}, arrays), type(SAMPLES[name]))
        assert str(error) == f"{key} is missing or has the wrong type"


@pytest.mark.parametrize(("name", "key"), keys())
def test_an_array_in_the_place_of_a_plain_field_is_refused(name: str, key: str) -> None:
    config, arrays = parts(SAMPLES[name])
    del config[key]
    forged = forge(config, arrays | {key: Array(VECTOR)})
    assert "wrong type" in str(refuse(forged, type(SAMPLES[name])))


@pytest.mark.parametrize(("name", "key"), keys(arrays=True))
def test_a_field_that_is_given_twice_is_refused(name: str, key: str) -> None:
    """As a plain value and as an array: which of them counts is not for a reader to guess."""
    config, arrays = parts(SAMPLES[name])
    twice = forge({key: 1} | config, {key: Array(VECTOR)} | arrays)
    assert "twice" in str(refuse(twice, type(SAMPLES[name])))


@pytest.mark.parametrize(("name", "key"), COLUMNS)
def test_columns_of_different_lengths_are_refused(name: str, key: str) -> None:
    config, arrays = parts(SAMPLES[name])
    column: list[Any] = config[key]
    for bent in (column[:1], column + column[:1], column[:0]):
        error = refuse(forge(config | {key: bent}, arrays), type(SAMPLES[name]))
        assert str(error) == f"{key.rpartition('.')[0]} has lists of different lengths"


def test_the_columns_that_are_tested_are_all_there_are() -> None:
    assert {name for name, _ in COLUMNS} == {
        "SharesAsk",
        "MaskedTrain",
        "MaskedEvaluate",
        "UnmaskAsk",
        "SealedShares",
        "Opening",
    }
    assert len(COLUMNS) == 5 + 3 + 3 + 2 + 3 + 2


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
