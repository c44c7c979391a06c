"""The site's identity: an Ed25519 private key that is made at the site and never leaves it."""

import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft.client.membership.state_files import IDENTITY
from fedgraft.common.errors import InputError
from fedgraft.common.files import write_private
from fedgraft.common.secagg.keys import Identity

__all__ = ["load_identity", "make_identity"]


def make_identity(state: Path) -> Identity:
    """Return the identity in the folder ``state``; make one if there is none yet.

    Raises:
        InputError: the file there is no private key, or others may read it.
    """
    path = state / IDENTITY
    if not path.exists():
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_private(path, pem)
    return load_identity(state)


def load_identity(state: Path) -> Identity:
    """Return the identity in the folder ``state`` (PKCS #8 in PEM, mode 0600).

    Raises:
        InputError: there is none, it is no Ed25519 private key, or others may read it.
    """
    path = state / IDENTITY
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise InputError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise InputError(f"no identity {path}", hint="a site makes it when it joins") from None
    except (ValueError, TypeError, OSError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            f"{path} is no Ed25519 private key", hint="restore it, or join the federation again"
        )
    return Identity(key.private_bytes_raw())
