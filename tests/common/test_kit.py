"""A kit opens for whoever was told the right fingerprint, unchanged and in time; it has no keys."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft.common.certificates import (
    fingerprint,
    issue_site,
    make_ca,
    make_csr,
    make_key,
    read_csr,
    site_of,
)
from fedgraft.common.errors import InputError
from fedgraft.common.federation import Floor
from fedgraft.common.kit import Kit, open_kit, write_kit

NOW = datetime(2026, 11, 1, tzinfo=UTC)
KEY = make_key()
CA = make_ca("trial", KEY, NOW)


def write(folder: Path, key: ec.EllipticCurvePrivateKey = KEY) -> Path:
    kit = Kit(
        federation="trial",
        site="hospital-a",
        endpoint="coordinator.example:8443",
        ca=CA.decode(),
        token="t" * 43,
        sites=("bank-b", "hospital-a"),
        floor=Floor(),
        policy="",
        issued=NOW,
        expires=NOW + timedelta(days=14),
    )
    path = folder / "hospital-a.kit"
    write_kit(kit, key, path)
    return path


@pytest.mark.parametrize("digits", [64, 32])
def test_a_kit_opens_with_the_fingerprint_or_its_first_half(tmp_path: Path, digits: int) -> None:
    kit = open_kit(write(tmp_path), fingerprint(CA)[:digits].upper(), NOW)
    assert kit.site == "hospital-a"
    assert (tmp_path / "hospital-a.kit").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("told", "what"),
    [("0" * 64, "another federation"), (fingerprint(CA)[:31], "first 32"), ("", "first 32")],
)
def test_a_wrong_fingerprint_does_not_open_it(tmp_path: Path, told: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        open_kit(write(tmp_path), told, NOW)


def test_it_expires(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expired"):
        open_kit(write(tmp_path), fingerprint(CA), NOW + timedelta(days=14))


def test_another_key_cannot_sign_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="changed after it was signed"):
        open_kit(write(tmp_path, make_key()), fingerprint(CA), NOW)


@pytest.mark.parametrize("field", [name for name in Kit.model_fields if name != "ca"])
def test_no_field_can_be_changed(tmp_path: Path, field: str) -> None:
    path = write(tmp_path)
    raw = json.loads(path.read_text())
    other = {
        "format": 2,
        "sites": ["hospital-a"],
        "floor": {"colluders": 2},
        "expires": "2030-01-01T00:00:00Z",
        "issued": "2020-01-01T00:00:00Z",
        "endpoint": "evil.example:8443",
        "token": "u" * 43,
    }
    raw["kit"][field] = other.get(field, "another")
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"changed after it was signed|is not a kit"):
        open_kit(path, fingerprint(CA), NOW)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kit": 1, "signature": "zz"}', "\x00"])
def test_what_is_no_kit_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.kit"
    path.write_text(text)
    with pytest.raises(InputError, match="is not a kit"):
        open_kit(path, fingerprint(CA), NOW)


def test_there_is_no_private_key_in_it(tmp_path: Path) -> None:
    assert "PRIVATE KEY" not in write(tmp_path).read_text()


def test_a_certificate_is_for_one_key_one_site_and_one_ca() -> None:
    key = make_key()
    public = read_csr(make_csr(key, "whatever"))
    week = timedelta(days=7)
    pem = issue_site(CA, KEY, public, site="hospital-a", now=NOW, lifetime=week)
    assert site_of(pem, CA, key.public_key(), NOW) == "hospital-a"
    other_key = make_key()
    other_ca = make_ca("trial", other_key, NOW)
    for ca, own, now in (
        (other_ca, key, NOW),
        (CA, other_key, NOW),
        (CA, key, NOW + week),
        (CA, key, NOW - timedelta(days=1)),
    ):
        with pytest.raises(InputError, match="cannot be used"):
            site_of(pem, ca, own.public_key(), now)
