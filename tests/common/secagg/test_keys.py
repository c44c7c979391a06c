"""Keys: the standards' own vectors through our wrappers, and what must be refused."""

import json
import os
from pathlib import Path

import pytest
from secagg import reference as slow

from fedgraft.common.secagg import keys
from fedgraft.common.secagg.errors import StatementError

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors/secagg/standards.json").read_text(encoding="utf-8")
)
SMALL_ORDER = (bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little"))


def test_x25519_is_rfc_7748() -> None:
    case = {
        key: bytes.fromhex(value) for key, value in VECTORS["rfc7748"].items() if len(value) > 9
    }
    alice, bob = keys.Exchange(case["alice"]), keys.Exchange(case["bob"])
    assert (alice.public, bob.public) == (case["alice_public"], case["bob_public"])
    assert alice.agree(bob.public) == bob.agree(alice.public) == case["shared"]
    assert slow.x25519(case["alice"], case["bob_public"]) == case["shared"]


@pytest.mark.parametrize("case", VECTORS["rfc8032"])
def test_ed25519_is_rfc_8032(case: dict[str, str]) -> None:
    private, public, message, signature = (
        bytes.fromhex(case[key]) for key in ("private", "public", "message", "signature")
    )
    identity = keys.Identity(private)
    assert identity.public == public == slow.ed25519_public(private)
    assert identity.sign(message) == signature == slow.ed25519_sign(private, message)
    assert identity.private_bytes() == private
    keys.verify(public, signature, message)
    for bad in (signature[:-1], bytes(64), b""):
        with pytest.raises(StatementError):
            keys.verify(public, bad, message)
    with pytest.raises(StatementError):
        keys.verify(public, signature, message + b"x")
    with pytest.raises(StatementError):
        keys.verify(public[:31], signature, message)


@pytest.mark.parametrize("case", VECTORS["rfc5869"])
def test_derivation_is_rfc_5869(case: dict[str, str]) -> None:
    secret, salt, info, okm = (bytes.fromhex(case[k]) for k in ("secret", "salt", "info", "okm"))
    assert keys.derive(secret, info, salt=salt, size=len(okm)) == okm
    assert slow.hkdf(secret, salt, info, len(okm)) == okm


def test_sealing_is_aes_256_gcm_and_authentic() -> None:
    key, text, other = bytes(range(32)), bytes(range(64)), b"all advertisements"
    sealed = keys.seal(key, text, other)
    assert sealed == slow.gcm_seal(key, text, other)
    assert len(sealed) == len(text) + keys.TAG_BYTES
    assert keys.open_sealed(key, sealed, other) == text
    flipped = bytes([sealed[0] ^ 1]) + sealed[1:]
    for arguments in ((key, flipped, other), (key, sealed, b"x"), (bytes(32), sealed, other)):
        with pytest.raises(StatementError):
            keys.open_sealed(*arguments)


@pytest.mark.parametrize("public", [*SMALL_ORDER, bytes(31), b""])
def test_keys_of_small_order_or_size_are_refused(public: bytes) -> None:
    with pytest.raises(StatementError):
        keys.Exchange.generate().agree(public)


def test_fresh_keys_differ_and_secrets_are_wiped() -> None:
    assert keys.Identity.generate().public != keys.Identity.generate().public
    pair = keys.Exchange.generate()
    other = keys.Exchange.generate()
    assert pair.public != other.public
    assert keys.Exchange(pair.private).public == pair.public
    pair.wipe()
    assert pair.private == bytes(32)
    with pytest.raises(StatementError):
        pair.agree(other.public)


def test_a_source_of_entropy_that_runs_short_is_no_source() -> None:
    with pytest.raises(ValueError):
        keys.draw(lambda size: os.urandom(size - 1), 32)


def test_a_commitment_is_to_one_seed() -> None:
    one, other = keys.commit(bytes(32)), keys.commit(bytes(31) + b"x")
    assert len(one) == 32
    assert not keys.same(one, other)
    assert keys.same(one, keys.commit(bytearray(32)))


def test_nothing_secret_is_printed() -> None:
    identity, pair = keys.Identity(b"\x41" * 32), keys.Exchange(b"\x41" * 32)
    for thing in (identity, pair):
        assert "AAAA" not in f"{thing!r} {thing}"
        assert "4141" not in f"{thing!r} {thing}"
