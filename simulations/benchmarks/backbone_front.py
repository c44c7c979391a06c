"""Real nginx over mutual TLS for the backbone benchmark: the same front for gRPC and for files."""

import datetime
import ipaddress
import os
import subprocess
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedgraft.common.errors import FedgraftError

__all__ = ["make_certificates", "start_nginx"]

CONFIGURATION = """
{user} daemon off; master_process on; worker_processes 2; pid {home}/nginx.pid;
error_log {home}/error.log warn;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; types {{}}
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{
    listen {address} ssl http2;
    ssl_certificate {tls}/server.pem; ssl_certificate_key {tls}/server.key;
    ssl_client_certificate {tls}/ca.pem; ssl_verify_client on; ssl_protocols TLSv1.2 TLSv1.3;
    ssl_buffer_size 16k;
    http2_chunk_size 128k;
    client_max_body_size 8m;
    location /files/ {{ alias {files}/; }}
    location /fedgraft.v1. {{
      grpc_pass grpc://unix:{socket};
      grpc_set_header x-site site;
      grpc_buffer_size 256k;
      grpc_read_timeout 120s; grpc_send_timeout 120s;
    }}
  }}
}}
"""


def make_certificates(folder: Path, host: str) -> None:
    """``ca.pem``, and key and certificate of ``server`` (for the address ``host``) and ``site``."""
    folder.mkdir()
    authority = ec.generate_private_key(ec.SECP256R1())
    root = _certify(authority, authority, "benchmark CA", "benchmark CA", host)
    (folder / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    for name in ("server", "site"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certify(key, authority, name, "benchmark CA", host)
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


def _certify(
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    subject: str,
    issuer: str,
    host: str,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (subject, issuer)]
    return (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=key is authority, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), False
        )
        .sign(authority, hashes.SHA256())
    )


def start_nginx(
    home: Path, address: str, *, tls: Path, files: Path, socket: Path
) -> "subprocess.Popen[bytes]":
    """nginx at ``address``: ``files`` under /files/, our services from ``socket``.

    Raises:
        FedgraftError: it did not start.
    """
    home.mkdir()
    configuration = CONFIGURATION.format(
        user="user root;" if os.geteuid() == 0 else "",  # the socket is its owner's alone
        home=home,
        address=address,
        tls=tls,
        files=files,
        socket=socket,
    )
    (home / "nginx.conf").write_text(configuration)
    log = home / "error.log"
    command = ["nginx", "-p", str(home), "-c", str(home / "nginx.conf"), "-e", str(log)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(100):
        if (home / "nginx.pid").exists():
            return process
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.terminate()
    said = log.read_text().splitlines() if log.exists() else ["is it installed?"]
    raise FedgraftError("nginx did not start", hint=said[-1])
