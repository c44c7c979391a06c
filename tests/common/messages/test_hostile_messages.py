"""Nothing but a payload is taken for one."""

from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from support.payload_samples import (
    COLUMNS,
    PLAIN,
    SAMPLES,
    VECTOR,
    array_at,
    every_key,
    forge,
    parts,
    refuse,
)

from fedgraft.common.messages.codec import encode
from fedgraft.common.messages.payloads import Refusal, TrainReply

EVERY = every_key()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_payload_of_another_kind_is_refused(name: str) -> None:
    kind = type(SAMPLES[name])
    others = [sample for sample in SAMPLES.values() if type(sample) is not kind]
    assert len(others) >= len(SAMPLES) - 2
    for other in others:
        assert kind.__name__ in str(refuse(encode(other), kind))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("version", [0, 1, 3, 2.0, True, "2", None])
def test_a_payload_of_another_format_is_refused(name: str, version: object) -> None:
    config, arrays = parts(SAMPLES[name])
    config["format"] = version
    if version is None:
        del config["format"]
    assert "format 2" in str(refuse(forge(config, arrays), type(SAMPLES[name])))


@pytest.mark.parametrize("kind", ["", "Payload", "MessageError", b"Refusal", ["Refusal"], 1])
def test_a_kind_that_is_none_is_refused(kind: Any) -> None:
    config, _ = parts(SAMPLES["Refusal"])
    refuse(forge(config | {"kind": kind}, {}), Refusal)
    del config["kind"]
    refuse(forge(config, {}), Refusal)


@pytest.mark.parametrize(("name", "key"), EVERY)
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


@pytest.mark.parametrize(("name", "key"), EVERY)
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


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_field_of_another_type_is_refused(name: str, key: str) -> None:
    config, arrays = parts(SAMPLES[name])
    array = array_at(SAMPLES[name], key) is not None  # then bytes are a file, good or bad
    right = bytes if array else types_of(config[key])
    lies = [lie for lie in LIES if types_of(lie) != right]
    arrays.pop(key, None)
    assert len(lies) >= len(LIES) - 1
    for lie in lies:
        error = refuse(forge(config | {key: lie}, arrays), type(SAMPLES[name]))
        assert str(error) == f"{key} is missing or has the wrong type"


@pytest.mark.parametrize(("name", "key"), PLAIN)
def test_an_array_in_the_place_of_a_plain_field_is_refused(name: str, key: str) -> None:
    config, arrays = parts(SAMPLES[name])
    del config[key]
    forged = forge(config, arrays | {key: Array(VECTOR)})
    assert "wrong type" in str(refuse(forged, type(SAMPLES[name])))


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_field_that_is_given_twice_is_refused(name: str, key: str) -> None:
    """As a plain value and as an array: which of them counts is not for a reader to guess."""
    config, arrays = parts(SAMPLES[name])
    config, arrays = {key: 1} | config, {key: Array(VECTOR)} | arrays
    twice = forge(config, arrays)
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
        "large MaskedTrain",
        "large MaskedEvaluate",
        "UnmaskAsk",
        "SealedShares",
        "Opening",
    }
    assert len(COLUMNS) == 5 + 4 * 3 + 2 + 3 + 2


def test_a_message_without_a_payload_record_is_refused() -> None:
    assert "no payload" in str(refuse(RecordDict({}), Refusal))
    arrays = ArrayRecord({"update": Array(VECTOR)})
    assert "no payload" in str(refuse(RecordDict({"payload": arrays}), TrainReply))
