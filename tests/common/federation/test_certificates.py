"""Certificates: what each is for, and requests that are not what they must be."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft.common.errors import InputError
from fedgraft.common.federation import certificates as c

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
CA_KEY, KEY = c.make_key(), c.make_key()
CA = c.make_ca("trial", CA_KEY, NOW)


def site_certificate(
    name: str = "hospital-a", key: ec.EllipticCurvePrivateKey = KEY, days: int = 7
) -> bytes:
    lifetime = timedelta(days=days)
    return c.issue_site(CA, CA_KEY, key.public_key(), site=name, now=NOW, lifetime=lifetime)


def read(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_a_site_certificate_names_the_site_and_is_for_clients_alone() -> None:
    found = read(site_certificate())
    assert found.subject.rfc4514_string() == "CN=hospital-a"
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not found.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert found.not_valid_after_utc == NOW + timedelta(days=7)
    assert found.not_valid_before_utc <= NOW


@pytest.mark.parametrize("host", ["fed.example.org", "10.1.2.3", "::1"])
def test_a_server_certificate_is_for_its_host_and_loopback(host: str) -> None:
    pem = c.issue_server(CA, CA_KEY, KEY.public_key(), host=host, now=NOW)
    names = read(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert host in [str(one.value) for one in names]
    uses = read(pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_openssl_finds_the_chain_good_and_each_use_its_own(tmp_path: Path) -> None:
    server = c.issue_server(CA, CA_KEY, KEY.public_key(), host="localhost", now=NOW)
    files = {"ca": CA, "site": site_certificate(), "server": server}
    for name, pem in files.items():
        (tmp_path / name).write_bytes(pem)

    def verifies(name: str, purpose: str) -> bool:
        at = str(int(NOW.timestamp()))
        command = ["openssl", "verify", "-x509_strict", "-attime", at, "-purpose", purpose]
        done = subprocess.run(
            [*command, "-CAfile", str(tmp_path / "ca"), str(tmp_path / name)],
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    assert verifies("site", "sslclient")
    assert verifies("server", "sslserver")
    assert not verifies("site", "sslserver")
    assert not verifies("server", "sslclient")


def test_a_request_gives_its_key_and_its_subject_counts_for_nothing() -> None:
    assert c.read_csr(c.make_csr(KEY, "somebody-else")) == KEY.public_key()


def request_of(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def changed_request() -> bytes:
    der = x509.load_pem_x509_csr(c.make_csr(KEY, "hospital-a"))
    raw = der.public_bytes(serialization.Encoding.DER).replace(b"hospital-a", b"hospital-b")
    return x509.load_der_x509_csr(raw).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"not a request",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        CA,
        request_of(ec.generate_private_key(ec.SECP384R1())),
        request_of(ec.generate_private_key(ec.SECP256K1())),
        request_of(rsa.generate_private_key(65537, 2048)),
        request_of(ed25519.Ed25519PrivateKey.generate()),
        changed_request(),
    ],
    ids=["empty", "text", "cut", "certificate", "p384", "secp256k1", "rsa", "ed25519", "changed"],
)
def test_a_request_that_is_none_is_refused(pem: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        c.read_csr(pem)


def test_a_key_is_kept_and_no_other_kind_is_taken() -> None:
    assert c.public_pem(c.load_key(c.key_to_pem(KEY))) == c.public_pem(KEY)
    other = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(ValueError, match="P-256"):
        c.load_key(c.key_to_pem(other))


def test_the_fingerprint_is_what_openssl_says(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CA)
    command = ["openssl", "x509", "-in", str(tmp_path / "ca.pem"), "-noout", "-fingerprint"]
    said = subprocess.run([*command, "-sha256"], capture_output=True, text=True, check=True)
    assert said.stdout.partition("=")[2].strip().replace(":", "").lower() == c.fingerprint(CA)


def test_the_revocation_list_holds_what_it_was_given() -> None:
    crl = c.make_crl(CA, CA_KEY, [5, 3, 5], NOW)
    assert c.revoked(crl) == {3, 5}
    assert x509.load_pem_x509_crl(crl).is_signature_valid(CA_KEY.public_key())
    assert c.revoked(c.make_crl(CA, CA_KEY, [], NOW)) == set()


def test_a_certificate_for_us_is_told_from_others() -> None:
    assert c.site_of(site_certificate(), CA, KEY.public_key(), NOW) == "hospital-a"
    other_ca = c.make_ca("trial", c.make_key(), NOW)
    wrong = {
        "another CA of the same name": (site_certificate(), other_ca, KEY, NOW),
        "another key": (site_certificate(key=c.make_key()), CA, KEY, NOW),
        "too late": (site_certificate(), CA, KEY, NOW + timedelta(days=7)),
        "too early": (site_certificate(), CA, KEY, NOW - timedelta(hours=1)),
        "no certificate": (b"x", CA, KEY, NOW),
    }
    for pem, ca, key, at in wrong.values():
        with pytest.raises(InputError, match="cannot be used") as error:
            c.site_of(pem, ca, key.public_key(), at)
        assert error.value.hint


def test_only_the_cas_signature_over_the_same_bytes_counts() -> None:
    signature = c.sign(CA_KEY, b"kit")
    assert c.verify(CA, signature, b"kit")
    assert not c.verify(CA, signature, b"kat")
    assert not c.verify(CA, c.sign(KEY, b"kit"), b"kit")
    assert not c.verify(CA, b"", b"kit")
