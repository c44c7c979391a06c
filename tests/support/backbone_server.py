"""A coordinator's gRPC server with backbones, on a unix socket or TCP, and its certificates.

As a process of its own: ``python backbone_server.py STORE ADDRESS`` until stdin closes.
"""

import datetime
import ipaddress
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.messages.grpc_channel import SERVER_OPTIONS
from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import (
    BackbonesServicer,
    add_BackbonesServicer_to_server,
)
from fedgraft.server.enrollment.backbone_service import BackboneService


@dataclass(frozen=True)
class Certified:
    """A P-256 key and its certificate, PEM."""

    key: bytes
    certificate: bytes


class Authority:
    """A CA that certifies servers on 127.0.0.1 and sites."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._certify("CA", self._key)

    def issue(self, name: str) -> Certified:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Certified(pem, self._certify(name, key))

    def _certify(self, name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=name == "CA", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


@contextmanager
def serving(
    servicer: BackbonesServicer, address: str, authority: Authority | None = None
) -> Iterator[str]:
    """Serve at ``unix:PATH`` or ``HOST:PORT`` (mutual TLS); where it listens."""
    server = grpc.server(ThreadPoolExecutor(8), options=SERVER_OPTIONS)
    add_BackbonesServicer_to_server(servicer, server)
    if authority is None:
        server.add_insecure_port(address)
    else:
        own = authority.issue("server")
        credentials = grpc.ssl_server_credentials(
            [(own.key, own.certificate)], authority.certificate, require_client_auth=True
        )
        host = address.partition(":")[0]
        address = f"{host}:{server.add_secure_port(address, credentials)}"
    server.start()
    try:
        yield address
    finally:
        server.stop(0).wait()


if __name__ == "__main__":
    with serving(BackboneService(BlobStore(Path(sys.argv[1]))), sys.argv[2]):
        print("ready", flush=True)
        sys.stdin.read()
