"""Every payload survives the wire, and its small arrays travel in its own record."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.matrix import tries
from support.payload_samples import (
    KINDS,
    LARGE,
    MEMORY,
    SAMPLES,
    SEALED,
    TRAIN,
    VECTOR,
    array_at,
    assert_equal,
    over_the_wire,
    parts,
    saved,
)

from fedgraft.common.messages.codec import (
    SMALL,
    Shared,
    Stage,
    array_hash,
    decode,
    encode,
    wire_bytes,
)
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    Payload,
    PlanRequest,
    Refusal,
    SharesAsk,
    TrainReply,
    TrainRequest,
    Work,
)
from fedgraft.common.secagg.statements import (
    Delivery,
    KeysRequest,
    MaskedInput,
    SharesRequest,
    Survivors,
)
from fedgraft.common.secagg.transcript import Parameters

LARGE_TRAIN = dataclasses.replace(TRAIN, adapter=LARGE)


def test_every_payload_has_a_sample() -> None:
    names = {name for name in SAMPLES if not name.startswith("large ")}
    assert names == {kind.__name__ for kind in KINDS} | {"Memory"}
    for name, sample in SAMPLES.items():
        assert type(sample).__name__ == name.removeprefix("large ")


def test_every_payload_with_arrays_is_there_with_small_and_with_large_ones() -> None:
    small, large = set(), set()
    for name, sample in SAMPLES.items():
        config, arrays = parts(sample)
        small |= {name for key in config if array_at(sample, key) is not None}
        large |= {name for _ in arrays}
    assert large == {f"large {name}" for name in small}
    assert len(small) == 8


def test_stages_are_message_types_of_flower() -> None:
    assert [str(stage) for stage in Stage] == [
        "query.plan",
        "query.keys",
        "query.shares",
        "train",
        "evaluate",
        "query.confirm",
        "query.unmask",
        "query.result",
    ]


def test_nested_fields_are_flat_keys_and_tuples_of_dataclasses_are_columns() -> None:
    config, arrays = parts(SAMPLES["MaskedTrain"])
    large, in_record = parts(SAMPLES["large MaskedTrain"])
    assert (config["kind"], config["format"]) == ("MaskedTrain", 2)
    assert config["train.round"] == 3
    assert config["train.names"] == ["x"]
    assert config["delivery.envelopes.sender"] == [0, 2]
    assert config["delivery.envelopes.ciphertext"] == [b"first", b"second"]
    assert config["train.adapter"] == saved(VECTOR)
    assert arrays == {}
    assert list(in_record) == ["train.adapter"]
    assert large.keys() == config.keys() - {"train.adapter"}


@pytest.mark.parametrize(
    ("shape", "dtype", "small"),
    [
        ((SMALL,), np.uint8, True),
        ((SMALL + 1,), np.uint8, False),
        ((SMALL // 8,), np.float64, True),
        ((SMALL // 8 + 1,), np.float64, False),
        ((2, SMALL // 8), np.float32, True),
        ((3, SMALL // 8), np.float32, False),
        ((), np.float64, True),
        ((0,), np.float32, True),
        ((SMALL * 2, 0), np.float32, True),
    ],
)
def test_an_array_is_small_by_its_bytes(shape: tuple[int, ...], dtype: Any, small: bool) -> None:
    tally = np.ones(shape, dtype)
    payload = EvaluateReply("s", 1, tally)
    config, arrays = parts(payload)
    assert ("tally" in config, "tally" in arrays) == (small, not small)
    assert (config["tally"] if small else arrays["tally"].data) == saved(tally)
    assert_equal(decode(over_the_wire(encode(payload)), EvaluateReply), payload)


@pytest.mark.parametrize("length", [12, 40_000])
def test_however_an_array_lies_in_memory_it_comes_back_as_it_was(length: int) -> None:
    array = np.arange(2 * length, dtype=np.float32).reshape(2, length)
    for update in (array, array.T, array[:, ::2], array[::-1], array.astype(">f4")):
        payload = TrainReply("s", 1, "l", 1, 0.5, update)
        assert_equal(decode(over_the_wire(encode(payload)), TrainReply), payload)


# --- round trips

texts = st.text(max_size=20)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)
dtypes = st.sampled_from([np.float32, np.float64, np.int64, np.uint8])
vectors = st.one_of(
    hnp.arrays(dtypes, hnp.array_shapes(min_side=0, max_dims=2)),
    st.builds(np.full, st.integers(SMALL, SMALL + 9), st.integers(0, 255), dtypes),  # large
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


@pytest.mark.parametrize("name", [name for name in SAMPLES if "large" not in name])
@given(st.data())
@settings(deadline=None, max_examples=tries(25))
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
    for update in (hard, np.resize(hard, LARGE.size)):
        payload = TrainReply("s", 1, "l", 1, float("inf"), update)
        assert_equal(decode(over_the_wire(encode(payload)), TrainReply), payload)


@pytest.mark.parametrize("name", ["MaskedTrain", "large MaskedEvaluate"])
def test_a_masked_request_names_its_session_as_every_request_does(name: str) -> None:
    request = SAMPLES[name]
    assert isinstance(request, MaskedTrain | MaskedEvaluate)
    assert request.session == "s"


# --- arrays that several payloads share


def test_an_array_that_payloads_share_is_serialised_once() -> None:
    shared: Shared = {}
    records = [encode(MaskedTrain(LARGE_TRAIN, Delivery((each,))), shared) for each in SEALED]
    records.append(encode(LARGE_TRAIN, shared))
    first = records[0]["arrays"]["train.adapter"].data
    assert records[1]["arrays"]["train.adapter"].data is first
    assert records[2]["arrays"]["adapter"].data is first
    for record, envelope in zip(records, SEALED, strict=False):  # the rest is each one's own
        assert decode(record, MaskedTrain).delivery.envelopes == (envelope,)


def test_calls_that_share_nothing_serialise_anew() -> None:
    one, other = encode(LARGE_TRAIN), encode(LARGE_TRAIN)
    assert one["arrays"]["adapter"].data is not other["arrays"]["adapter"].data


def test_small_arrays_are_not_kept_to_be_shared() -> None:
    shared: Shared = {}
    for _ in range(2):
        assert_equal(decode(encode(TRAIN, shared), TrainRequest), TRAIN)
    assert shared == {}


@pytest.mark.parametrize("size", [64, LARGE.size])
def test_arrays_are_never_mixed_up_when_memory_is_used_again(size: int) -> None:
    shared: Shared = {}
    records = [
        encode(dataclasses.replace(TRAIN, adapter=np.full(size, number, np.float32)), shared)
        for number in range(200)  # each is gone before the next is made
    ]
    for number, record in enumerate(records):
        assert set(decode(record, TrainRequest).adapter.tolist()) == {number}


# --- what a record is


def test_a_reply_may_be_one_of_several_kinds() -> None:
    assert isinstance(decode(encode(SAMPLES["Refusal"]), TrainReply, Refusal), Refusal)
    assert isinstance(decode(encode(SAMPLES["TrainReply"]), TrainReply, Refusal), TrainReply)


def test_a_record_is_one_config_and_at_most_one_array_record() -> None:
    assert list(encode(SAMPLES["large TrainReply"])) == ["payload", "arrays"]
    assert list(encode(SAMPLES["TrainReply"])) == ["payload"]
    assert list(encode(SAMPLES["Refusal"])) == ["payload"]


# --- sizes and hashes


@pytest.mark.parametrize("length", [0, 1, 1000, SMALL // 4, SMALL // 4 + 1, 100_000])
def test_wire_bytes_are_the_arrays_and_a_little(length: int) -> None:
    vector = np.zeros(length, np.float32)
    record = encode(TrainReply("s" * 32, 3, "l" * 64, 12, 0.5, vector))
    assert vector.nbytes + 128 <= wire_bytes(record) <= vector.nbytes + 700
    assert wire_bytes(over_the_wire(record)) == wire_bytes(record)


def test_wire_bytes_tell_nothing_of_where_an_array_travels() -> None:
    sizes = [wire_bytes(encode(EvaluateReply("s", 1, np.zeros(SMALL + n, "u1")))) for n in (0, 1)]
    assert abs(sizes[1] - sizes[0]) < 64


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
        "import os, fedgraft.common.messages.codec; "
        "print(*(os.environ[n] for n in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK', "
        "'FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=quiet, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1", "1"]
