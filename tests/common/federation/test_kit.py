"""A kit: opened by who was told its fingerprint, and by nobody once it was changed."""

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.matrix import tries

from fedgraft.common.errors import InputError
from fedgraft.common.federation.certificates import fingerprint, make_ca, make_key
from fedgraft.common.federation.federation_file import Floor
from fedgraft.common.federation.kit import Kit, open_kit, sign_kit, write_kit

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
KEY = make_key()
CA = make_ca("trial", KEY, NOW)
TOLD = fingerprint(CA)
KIT = Kit(
    federation="trial",
    site="hospital-a",
    endpoint="fed.example.org:8443",
    ca=CA.decode(),
    token="t" * 43,
    sites=("hospital-a", "hospital-b"),
    floor=Floor(),
    policy='[approval]\nmode = "ask"\n',
    issued=NOW,
    expires=NOW + timedelta(days=14),
)
SIGNED: dict[str, Any] = json.loads(sign_kit(KIT, KEY))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "hospital-a.kit"
    write_kit(KIT, KEY, file)
    return file


def refused(path: Path, why: str, told: str = TOLD, now: datetime = NOW) -> None:
    with pytest.raises(InputError, match=why) as error:
        open_kit(path, told, now)
    assert error.value.hint


def colons(digits: str) -> str:
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2)).upper()


@pytest.mark.parametrize(
    "told",
    [TOLD, colons(TOLD), f"SHA256:{TOLD}", TOLD[:32], colons(TOLD[:40]), f" {TOLD}\n"],
    ids=["whole", "colons", "kind", "half", "part", "blanks"],  # the CA is another each time
)
def test_a_kit_opens_with_the_fingerprint_as_people_write_it(path: Path, told: str) -> None:
    assert open_kit(path, told, NOW) == KIT


@pytest.mark.parametrize(
    "told",
    ["", TOLD[:31], TOLD + "0", "g" * 64, TOLD[:-1] + "x", "*" * 32],
    ids=["none", "short", "long", "no digits", "one no digit", "stars"],
)
def test_a_fingerprint_that_is_too_short_or_none_is_refused(path: Path, told: str) -> None:
    refused(path, "64 hex digits", told)


def test_another_fingerprint_is_refused(path: Path) -> None:
    last = "0" if TOLD[-1] != "0" else "1"
    refused(path, "another federation", TOLD[:-1] + last)
    refused(path, "another federation", TOLD[32:])


def test_a_kit_ends(path: Path) -> None:
    open_kit(path, TOLD, KIT.expires - timedelta(seconds=1))
    refused(path, "expired", now=KIT.expires)


def test_a_kit_of_another_ca_is_refused_even_if_it_is_in_order(tmp_path: Path) -> None:
    other = make_key()
    kit = KIT.model_copy(update={"ca": make_ca("trial", other, NOW).decode()})
    write_kit(kit, other, tmp_path / "x.kit")
    refused(tmp_path / "x.kit", "another federation")


def test_the_right_ca_with_another_keys_signature_is_refused(tmp_path: Path) -> None:
    write_kit(KIT, make_key(), tmp_path / "x.kit")
    refused(tmp_path / "x.kit", "was changed")


PARTS = [*SIGNED["kit"], *(f"floor.{name}" for name in SIGNED["kit"]["floor"])]
OTHER = st.one_of(
    st.text(max_size=20), st.integers(), st.floats(), st.none(), st.booleans(), st.just(...),
    st.lists(st.text(max_size=5), max_size=3),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=tries(300))
@given(part=st.sampled_from([*PARTS, "signature", "extra"]), value=OTHER)
def test_a_change_of_any_part_is_seen(tmp_path: Path, part: str, value: object) -> None:
    """Also of one that is taken out (``...``) although it has a default."""
    changed = json.loads(json.dumps(SIGNED))
    place = changed if part == "signature" else changed["kit"]
    *outer, name = part.split(".")
    for step in outer:
        place = place[step]
    if value is ...:
        place.pop(name, None)
    elif name not in place or type(place[name]) is not type(value) or place[name] != value:
        place[name] = value
    if changed == SIGNED and str(changed) == str(SIGNED):
        return
    file = tmp_path / "changed.kit"
    file.write_text(json.dumps(changed))
    refused(file, "was changed|is not a kit|another federation")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=tries(300))
@given(place=st.integers(0), bit=st.integers(0, 7))
@example(place=168, bit=1)  # the version of the CA's certificate, in most kits
def test_a_flipped_bit_never_gives_another_kit(tmp_path: Path, place: int, bit: int) -> None:
    raw = bytearray(sign_kit(KIT, KEY))
    raw[place % len(raw)] ^= 1 << bit
    file = tmp_path / "flipped.kit"
    file.write_bytes(raw)
    try:
        assert open_kit(file, TOLD, NOW) == KIT  # white space, or the case of a digit
    except InputError as error:
        assert error.hint


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"kit"', b"[" * 100_000, b"\xff\xfe", b"{}", b" " * 2_000_000,
     b'{"kit": [], "signature": ""}', b'{"kit": {}, "signature": "00"}',
     json.dumps({**SIGNED, "signature": 7}).encode(), json.dumps({"kit": SIGNED["kit"]}).encode()],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_kit_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.kit"
    file.write_bytes(content)
    refused(file, "is not a kit")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.kit", "no file")
    refused(tmp_path, "is not a kit")


def test_a_kit_is_for_its_owner_alone_and_must_name_its_site(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="not among"):
        Kit.model_validate({**KIT.model_dump(), "sites": ("hospital-b",)})
