"""A seal holds for one site, one request and every byte of a reply."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from support.payload_samples import REPLIES, SAMPLES, assert_equal, over_the_wire

from fedgraft.common.errors import MessageError
from fedgraft.common.messages.codec import SMALL, decode, encode
from fedgraft.common.messages.payloads import TrainReply
from fedgraft.common.messages.signatures import seal, unseal
from fedgraft.common.secagg.keys import Identity
from fedgraft.common.secagg.statements import SealedShares

SITE = Identity(bytes(range(32)))
OTHER = Identity(bytes(range(1, 33)))
KEYS = {"a": SITE.public, "b": OTHER.public}


def reply(loss: float = 0.5, update: float = 1.0) -> RecordDict:
    values = np.array([update, 2.0], np.float32)
    return encode(TrainReply("s" * 32, 1, "layout", 10, loss, values))


def sealed(request: str = "request") -> RecordDict:
    content = reply()
    seal(content, site="a", request=request, sign=SITE.sign)
    return content


def parts(content: RecordDict) -> dict[str, object]:
    return {key: value for key, value in content["payload"].items() if key.startswith("seal.")}


def test_a_sealed_reply_is_read_and_the_seal_is_off() -> None:
    content = sealed()
    assert unseal(content, request="request", key_of=KEYS.get) == "a"
    assert decode(content, TrainReply).examples == 10


@pytest.mark.parametrize("name", REPLIES)
def test_every_reply_is_read_under_its_seal_after_the_wire(name: str) -> None:
    content = encode(SAMPLES[name])
    records = list(content)
    seal(content, site="a", request="request", sign=SITE.sign)
    assert list(content) == records  # another would cost two more requests
    arrived = over_the_wire(content)
    assert unseal(arrived, request="request", key_of=KEYS.get) == "a"
    assert_equal(decode(arrived, type(SAMPLES[name])), SAMPLES[name])


def test_a_seal_is_over_lists_of_nothing_too() -> None:
    content = encode(SealedShares(1, ()))
    seal(content, site="a", request="request", sign=SITE.sign)
    arrived = over_the_wire(content)
    assert unseal(arrived, request="request", key_of=KEYS.get) == "a"
    assert decode(arrived, SealedShares) == SealedShares(1, ())


LARGE = Array(np.ones(SMALL, np.float32))


@pytest.mark.parametrize(
    "arrays",
    [
        {"update": Array(np.full(SMALL, 2, np.float32))},
        {"update": Array("float32", (SMALL, 1), "numpy.ndarray", LARGE.data)},
        {"update": Array("float64", (SMALL,), "numpy.ndarray", LARGE.data)},
        {"update": LARGE, "more": LARGE},
        {"another": LARGE},
        {},
    ],
    ids=["values", "shape", "dtype", "one more", "name", "none"],
)
def test_a_large_array_that_was_changed_is_refused(arrays: dict[str, Array]) -> None:
    content = encode(TrainReply("s", 1, "layout", 10, 0.5, np.ones(SMALL, np.float32)))
    seal(content, site="a", request="request", sign=SITE.sign)
    content["arrays"] = ArrayRecord(arrays)
    with pytest.raises(MessageError, match="broken"):
        unseal(content, request="request", key_of=KEYS.get)


def test_a_seal_is_for_one_request() -> None:
    with pytest.raises(MessageError, match="broken"):
        unseal(sealed("another"), request="request", key_of=KEYS.get)


def test_another_site_cannot_seal_for_this_one() -> None:
    content = reply()
    seal(content, site="a", request="request", sign=OTHER.sign)
    with pytest.raises(MessageError, match="broken"):
        unseal(content, request="request", key_of=KEYS.get)


def test_a_stranger_or_no_seal_is_refused() -> None:
    with pytest.raises(MessageError, match="stranger"):
        unseal(sealed(), request="request", key_of=lambda site: None)
    with pytest.raises(MessageError, match="without"):
        unseal(reply(), request="request", key_of=KEYS.get)


@pytest.mark.parametrize("changed", [reply(loss=0.25), reply(update=1.5)], ids=["loss", "update"])
def test_what_was_changed_on_its_way_is_refused(changed: RecordDict) -> None:
    changed = changed.copy()
    changed["payload"] = ConfigRecord({**changed["payload"], **parts(sealed())})
    with pytest.raises(MessageError, match="broken"):
        unseal(changed, request="request", key_of=KEYS.get)


def test_a_record_that_was_added_is_refused() -> None:
    content = sealed()
    content["more"] = ConfigRecord({"x": 1})
    with pytest.raises(MessageError, match="broken"):
        unseal(content, request="request", key_of=KEYS.get)


@given(st.binary(max_size=80), st.text(max_size=10))
def test_any_other_seal_is_refused(signature: bytes, site: str) -> None:
    content = reply()
    content["payload"].update({"seal.site": site, "seal.signature": signature})
    with pytest.raises(MessageError):
        unseal(content, request="request", key_of=KEYS.get)
