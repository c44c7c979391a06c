"""The federation's certificates: one CA, the coordinator's server certificate, one for each site.

All are X.509 (RFC 5280) with ECDSA on P-256: Flower signs requests with NIST curves, and gRPC's TLS
library does not accept Ed25519. Functions get the time as an argument and return PEM; no function
reads a file.
"""

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft.common.errors import InputError

__all__ = [
    "begins",
    "expires",
    "fingerprint",
    "issue_server",
    "issue_site",
    "key_to_pem",
    "load_key",
    "make_ca",
    "make_crl",
    "make_csr",
    "make_key",
    "public_pem",
    "read_csr",
    "revoked",
    "serial",
    "sign",
    "site_of",
    "verify",
]

CA_DAYS, SERVER_DAYS = 3650, 825
BEHIND = timedelta(minutes=5)  # a slightly slow clock must not refuse a new certificate
HASH = hashes.SHA256()


def make_key() -> ec.EllipticCurvePrivateKey:
    """Return a new P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the private key as PKCS #8 in PEM, not encrypted: for a file of mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the P-256 key in ``pem``.

    Raises:
        ValueError: it is something else.
    """
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise ValueError("not a P-256 key")
    return key


def public_pem(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> bytes:
    """Return the public key as SubjectPublicKeyInfo in PEM, Flower's format for a node's key."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def make_ca(name: str, key: ec.EllipticCurvePrivateKey, now: datetime) -> bytes:
    """Return the CA certificate of the federation ``name``, PEM."""
    subject = _named(f"{name} CA"[:64])
    builder = _begin(subject, subject, key.public_key(), now, timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(ca=True), critical=True)
    return _signed(builder, key)


def issue_server(
    ca: bytes,
    ca_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    *,
    host: str,
    now: datetime,
) -> bytes:
    """Return the coordinator's certificate for ``host`` (a name or address) and loopback, PEM."""
    names = dict.fromkeys((host, "localhost", "127.0.0.1"))
    builder = _begin(
        _named(host[:64]), _subject(ca), public, now, timedelta(days=SERVER_DAYS)
    ).add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), False)
    return _signed(_leaf(builder, ExtendedKeyUsageOID.SERVER_AUTH), ca_key)


def issue_site(
    ca: bytes,
    ca_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    *,
    site: str,
    now: datetime,
    lifetime: timedelta,
) -> bytes:
    """Return a site's certificate, PEM; its subject is CN=``site``, independent of the request."""
    builder = _begin(_named(site), _subject(ca), public, now, lifetime)
    return _signed(_leaf(builder, ExtendedKeyUsageOID.CLIENT_AUTH), ca_key)


def make_csr(key: ec.EllipticCurvePrivateKey, site: str) -> bytes:
    """Return a request for a certificate (PKCS #10, RFC 2986), PEM."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_named(site))
    return builder.sign(key, HASH).public_bytes(serialization.Encoding.PEM)


def read_csr(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public key in a certificate request; the request proves that its sender holds it.

    Raises:
        ValueError: it is malformed, not signed by its key, or not on P-256.
    """
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("not a P-256 key")
        if not request.is_signature_valid:
            raise ValueError("not signed by its key")
    except UnsupportedAlgorithm:
        raise ValueError("not a P-256 key") from None
    return key


def make_crl(
    ca: bytes, key: ec.EllipticCurvePrivateKey, serials: Iterable[int], now: datetime
) -> bytes:
    """Return the list of revoked certificates, PEM; it is valid as long as a CA certificate."""
    builder = x509.CertificateRevocationListBuilder().issuer_name(_subject(ca))
    builder = builder.last_update(now - BEHIND).next_update(now + timedelta(days=CA_DAYS))
    for number in sorted(set(serials)):
        revoked = x509.RevokedCertificateBuilder().serial_number(number)
        builder = builder.add_revoked_certificate(revoked.revocation_date(now).build())
    return builder.sign(key, HASH).public_bytes(serialization.Encoding.PEM)


def revoked(crl: bytes) -> set[int]:
    """Return the serial numbers in a list of revoked certificates."""
    return {one.serial_number for one in x509.load_pem_x509_crl(crl)}


def _read(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except x509.InvalidVersion as error:  # not a ValueError, unlike all other errors
        raise ValueError(str(error)) from None


def fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of a certificate, 64 hex digits.

    Raises:
        ValueError: ``pem`` is not a certificate.
    """
    return _read(pem).fingerprint(HASH).hex()


def expires(pem: bytes) -> datetime:
    """Return the end of a certificate's validity (UTC)."""
    return _read(pem).not_valid_after_utc


def begins(pem: bytes) -> datetime:
    """Return the start of a certificate's validity (UTC)."""
    return _read(pem).not_valid_before_utc


def serial(pem: bytes) -> int:
    """Return a certificate's serial number."""
    return _read(pem).serial_number


def site_of(pem: bytes, ca: bytes, public: ec.EllipticCurvePublicKey, now: datetime) -> str:
    """Return the site in ``pem``, a valid certificate from ``ca`` for the key ``public``.

    Raises:
        InputError: it is not valid, not from ``ca``, for another key, or has more than a name.
    """
    try:
        certificate = _read(pem)
        certificate.verify_directly_issued_by(_read(ca))
        if certificate.public_key() != public:
            raise ValueError("it is for another key")
        if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
            raise ValueError("it is not valid now")
        name, *more = certificate.subject
        if more or name.oid != NameOID.COMMON_NAME:
            raise ValueError("its subject is not a name alone")
    except (ValueError, TypeError, InvalidSignature) as error:
        what = str(error) or "it is not signed by the federation's CA"
        raise InputError(
            f"the certificate cannot be used: {what}",
            hint="set this machine's clock, then ask the coordinator for a new kit",
        ) from None
    return str(name.value)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Return the ECDSA signature with SHA-256 over ``message``, DER."""
    return key.sign(message, ec.ECDSA(HASH))


def verify(ca: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether the key of the certificate ``ca`` made ``signature`` over ``message``."""
    key = _read(ca).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, message, ec.ECDSA(HASH))
    except InvalidSignature:
        return False
    return True


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEHIND)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _leaf(builder: x509.CertificateBuilder, use: x509.ObjectIdentifier) -> x509.CertificateBuilder:
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(ca=False), critical=True)
    return builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(key, HASH).public_bytes(serialization.Encoding.PEM)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _subject(ca: bytes) -> x509.Name:
    return _read(ca).subject


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
