"""A site's private key is made once, at the site, and nobody else gets to read it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from fedgraft.client.membership.identity import load_identity, make_identity
from fedgraft.common.errors import InputError


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A site's state folder, which is not there yet."""
    return tmp_path / "site" / "state"


@pytest.fixture
def _careless() -> Iterator[None]:
    """A process whose files are by default for everybody."""
    before = os.umask(0)
    yield
    os.umask(before)


def put(state: Path, content: bytes, mode: int = 0o600) -> Path:
    """Write an identity file that the site did not make."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "identity.pem"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def pem(key: PrivateKeyTypes, password: bytes | None = None) -> bytes:
    """A private key as PKCS #8."""
    hidden: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        hidden = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def refused(state: Path, make: Callable[[Path], object] = load_identity) -> InputError:
    with pytest.raises(InputError) as caught:
        make(state)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert str(state / "identity.pem") in str(caught.value)
    return caught.value


def test_an_identity_is_made_once_and_then_stays(state: Path) -> None:
    made = make_identity(state)
    content = (state / "identity.pem").read_bytes()
    assert make_identity(state).public == load_identity(state).public == made.public
    assert (state / "identity.pem").read_bytes() == content


def test_two_sites_have_two_identities(tmp_path: Path) -> None:
    assert make_identity(tmp_path / "a").public != make_identity(tmp_path / "b").public


def test_the_file_is_a_pkcs8_key_that_any_tool_reads(state: Path) -> None:
    made = make_identity(state)
    content = (state / "identity.pem").read_bytes()
    assert content.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    key = serialization.load_pem_private_key(content, password=None)
    assert isinstance(key, Ed25519PrivateKey)
    assert key.public_key().public_bytes_raw() == made.public
    assert key.private_bytes_raw() == made.private_bytes()


def test_what_an_identity_signs_verifies_with_its_public_key(state: Path) -> None:
    make_identity(state)
    identity = load_identity(state)
    Ed25519PublicKey.from_public_bytes(identity.public).verify(identity.sign(b"word"), b"word")


def test_a_key_that_another_tool_made_is_taken(state: Path) -> None:
    key = Ed25519PrivateKey.generate()
    put(state, pem(key))
    assert make_identity(state).public == key.public_key().public_bytes_raw()


# Who can read it


@pytest.mark.usefixtures("_careless")
def test_a_new_identity_is_for_its_owner_alone(state: Path) -> None:
    make_identity(state)
    assert (state / "identity.pem").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("_careless")
def test_the_private_key_is_at_no_time_in_a_file_that_others_can_read(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        modes.append(self.stat().st_mode & 0o777)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    make_identity(state)
    assert modes == [0o600]
    assert [entry.name for entry in state.iterdir()] == ["identity.pem"]  # no copy stays


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o601, 0o777])
@pytest.mark.parametrize("make", [load_identity, make_identity])
def test_a_file_that_is_open_to_others_is_refused(
    state: Path, mode: int, make: Callable[[Path], object]
) -> None:
    make_identity(state)
    (state / "identity.pem").chmod(mode)
    error = refused(state, make)
    assert "others" in str(error)
    assert error.hint == f"chmod 600 {state / 'identity.pem'}"


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_for_the_owner_alone_is_taken(state: Path, mode: int) -> None:
    made = make_identity(state)
    (state / "identity.pem").chmod(mode)
    assert load_identity(state).public == made.public


def test_an_identity_does_not_print_its_key(state: Path) -> None:
    identity = make_identity(state)
    private = identity.private_bytes()
    lines = (state / "identity.pem").read_text().splitlines()
    for text in (repr(identity), str(identity), f"{identity}", repr([identity])):
        assert private.hex() not in text.lower()
        assert repr(private)[2:-1] not in text
        assert lines[1] not in text


# What is no identity


def test_no_identity_is_an_error_that_says_where_one_comes_from(state: Path) -> None:
    error = refused(state)
    assert str(error).startswith("no identity")
    assert "joins" in error.hint
    assert not state.exists()  # looking makes nothing


# A PKCS #8 key of a kind that nobody knows: the object identifier 1.3.101.5.
UNKNOWN = (
    b"-----BEGIN PRIVATE KEY-----\n"
    b"MC4CAQAwBQYDK2UFBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n"
    b"-----END PRIVATE KEY-----\n"
)
OTHERS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "garbage": lambda: b"\x00\xffgarbage" * 9,
    "an empty frame": lambda: b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
    "cut short": lambda: pem(Ed25519PrivateKey.generate())[:70],
    "raw bytes": lambda: bytes(range(32)),
    "a public key": lambda: (
        Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    ),
    "locked by a password": lambda: pem(Ed25519PrivateKey.generate(), b"password"),
    "x25519": lambda: pem(x25519.X25519PrivateKey.generate()),
    "ed448": lambda: pem(ed448.Ed448PrivateKey.generate()),
    "ecdsa": lambda: pem(ec.generate_private_key(ec.SECP256R1())),
    "rsa": lambda: pem(rsa.generate_private_key(65537, 2048)),
    "unknown": lambda: UNKNOWN,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("make", [load_identity, make_identity])
def test_a_file_that_holds_no_such_key_is_refused_and_kept(
    state: Path, name: str, make: Callable[[Path], object]
) -> None:
    content = OTHERS[name]()
    path = put(state, content)
    error = refused(state, make)
    assert "no Ed25519 private key" in str(error)
    assert path.read_bytes() == content  # it may be somebody's only copy of something


def test_an_error_does_not_quote_the_file(state: Path) -> None:
    secret = "MC4CAQAwBQYDK2VwBCIEIPrivate"
    put(state, f"-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----\n".encode())
    error = refused(state)
    assert secret not in f"{error} {error.hint} {error.__cause__}"


def test_a_folder_in_the_place_of_the_file_is_refused(state: Path) -> None:
    (state / "identity.pem").mkdir(parents=True, mode=0o700)
    assert "no Ed25519 private key" in str(refused(state))
