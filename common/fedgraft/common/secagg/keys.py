"""The keys of secure aggregation: for signatures, for the agreement on secrets, for sealed shares.

Ed25519 (RFC 8032) for the long-lived identity, X25519 (RFC 7748) for two fresh key pairs per round,
HKDF-SHA256 (RFC 5869) with a separate info for every use, AES-256-GCM (SP 800-38D) for shares. A
sealing key is derived for one message in one direction, so its nonce may be zero. Python cannot
guarantee that no copy of a secret stays in memory: secrets in a ``bytearray`` are overwritten, and
the others are dropped at once.
"""

import hashlib
import hmac
import os
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedgraft.common.secagg.errors import StatementError

__all__ = [
    "KEY_BYTES",
    "SIGNATURE_BYTES",
    "TAG_BYTES",
    "Entropy",
    "Exchange",
    "Identity",
    "commit",
    "derive",
    "draw",
    "open_sealed",
    "same",
    "seal",
    "verify",
    "wipe",
]

Entropy = Callable[[int], bytes]  # os.urandom, or fixed bytes in a known-answer test

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16
SALT = b"fedgraft-secagg/1"
NONCE = bytes(12)


def draw(entropy: Entropy, size: int) -> bytearray:
    """Return ``size`` secret bytes that can be wiped.

    Raises:
        ValueError: the source gave another number of bytes.
    """
    secret = bytearray(entropy(size))
    if len(secret) != size:
        raise ValueError("the entropy source ran short")
    return secret


def wipe(secret: bytearray) -> None:
    """Overwrite a secret in place."""
    secret[:] = bytes(len(secret))


def same(one: bytes, other: bytes) -> bool:
    """Compare digests or keys; the time does not depend on the position of a difference."""
    return hmac.compare_digest(one, other)


class Identity:
    """A site's long-lived Ed25519 key pair, made at the site; only ``public`` ever leaves it."""

    def __init__(self, private: bytes | bytearray) -> None:
        """Take 32 private bytes (RFC 8032, 5.1.5); ValueError for another length."""
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> "Identity":
        """Return a new identity."""
        return cls(draw(entropy, KEY_BYTES))

    def private_bytes(self) -> bytes:
        """Return the 32 private bytes, for the file that never leaves the site."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes; it is always the same for the same message."""
        return self._key.sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature of ``message``.

    Raises:
        StatementError: it is not ``public``'s signature, or one of them is malformed.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise StatementError("the signature is not valid") from None


class Exchange:
    """One X25519 key pair for one round."""

    def __init__(self, private: bytes | bytearray) -> None:
        """Take 32 private bytes, which are copied; ValueError for another length."""
        self._key: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(private)
        self.private = bytearray(private)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> "Exchange":
        """Return a fresh key pair."""
        private = draw(entropy, KEY_BYTES)
        pair = cls(private)
        wipe(private)
        return pair

    def agree(self, public: bytes) -> bytes:
        """Return the 32-byte secret shared with the owner of ``public``.

        It must never be used without ``derive``.

        Raises:
            StatementError: the key is malformed or of small order (RFC 7748, 6.1), or this pair
                was wiped.
        """
        if self._key is None:
            raise StatementError("the key pair was wiped")
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise StatementError("a public key cannot be used") from None

    def wipe(self) -> None:
        """Overwrite the private bytes and drop the key; ``agree`` refuses from then on."""
        wipe(self.private)
        self._key = None


def derive(
    secret: bytes | bytearray, info: bytes, *, salt: bytes = SALT, size: int = KEY_BYTES
) -> bytes:
    """Return ``size`` bytes bound to ``info`` by HKDF-SHA256 (RFC 5869); ``info`` names the use."""
    return HKDF(hashes.SHA256(), size, salt, info).derive(bytes(secret))


def commit(seed: bytes | bytearray) -> bytes:
    """Return the SHA-256 commitment to a 32-byte seed; it is hiding because the seed is uniform."""
    return hashlib.sha256(SALT + b" commitment" + seed).digest()


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Return AES-256-GCM of ``plaintext`` under a single-use ``key``: 16 bytes more."""
    return AESGCM(key).encrypt(NONCE, plaintext, associated)


def open_sealed(key: bytes, ciphertext: bytes, associated: bytes) -> bytearray:
    """Return the plaintext that was sealed with the same key and associated data.

    Raises:
        StatementError: the ciphertext is not authentic.
    """
    try:
        return bytearray(AESGCM(key).decrypt(NONCE, ciphertext, associated))
    except InvalidTag:
        raise StatementError("a sealed share is not authentic") from None
