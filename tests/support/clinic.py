"""A site that has joined, and a coordinator with a clock and a backbone, over real TLS.

Neither needs the other: each can be wrong on its own.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from fedgraft import common
from fedgraft.client.doctor.checklist import CHECKS, Check, Finding, examine
from fedgraft.client.membership.identity import make_identity
from fedgraft.common.backbones.blob_store import BlobStore, make_manifest
from fedgraft.common.federation.certificates import (
    fingerprint,
    issue_server,
    issue_site,
    key_to_pem,
    make_ca,
    make_key,
)
from fedgraft.common.federation.federation_file import Federation, dump_federation
from fedgraft.common.files import write_private
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.server.enrollment.backbone_service import BackboneService

__all__ = [
    "CANARY",
    "MANIFEST",
    "NETWORK",
    "QUICK",
    "Authority",
    "Coordinator",
    "Site",
    "look",
    "states",
]

CANARY = "canary-7f3e"
QUICK = tuple(check for check in CHECKS if check.name not in ("device", "training"))
NETWORK = ("name", "tcp", "tls", "coordinator", "clock", "latency", "rate")
BUILTIN = Path(common.__file__).parent / "builtin" / "glyph-vit"
MANIFEST = make_manifest(BUILTIN, source="builtin")
SITE = """
name = "a"
policy = "policy.toml"
federation = "state/roster.toml"
device = "cpu"
[data]
train = "train.csv"
test = "test.jsonl"
"""


class Authority:
    """A federation's CA."""

    def __init__(self) -> None:
        self.key = make_key()
        self.pem = make_ca("trial", self.key, datetime.now(UTC))

    def site(self, public: Any, *, days: float = 7, name: str = "a") -> bytes:
        """A certificate for a site that ends ``days`` from now."""
        lifetime = timedelta(days=7)
        began = datetime.now(UTC) + timedelta(days=days) - lifetime
        return issue_site(self.pem, self.key, public, site=name, now=began, lifetime=lifetime)

    def server(self, *, age: float = 0) -> tuple[bytes, bytes]:
        """A server's key and certificate, issued ``age`` days ago for localhost and 127.0.0.1."""
        key, when = make_key(), datetime.now(UTC) - timedelta(days=age)
        pem = issue_server(self.pem, self.key, key.public_key(), host="localhost", now=when)
        return key_to_pem(key), pem


class Site:
    """A site's folder as ``join`` leaves it and its people fill it in; all is well with it."""

    def __init__(self, folder: Path, authority: Authority, endpoint: str) -> None:
        self.folder, self.authority = folder, authority
        self.file, self.state = folder / "site.toml", folder / "state"
        self.state.mkdir(mode=0o700, parents=True)
        self.key = make_key()
        write_private(self.state / "tls.key", key_to_pem(self.key))
        self.certify()
        (self.state / "ca.pem").write_bytes(authority.pem)
        own = make_identity(self.state).public.hex()
        federation = Federation(sites={"a": own, "b": "ab" * 32})
        (self.state / "roster.toml").write_text(dump_federation(federation))
        self.endpoint(endpoint)
        self.file.write_text(SITE)
        self.allow(MANIFEST.digest)
        (folder / "train.csv").write_text(f"text,label\n{CANARY},{CANARY}-label\nmore,x\n")
        (folder / "test.jsonl").write_text(f'{{"text": "{CANARY}", "label": "{CANARY}"}}\n')

    def certify(self, *, days: float = 7, name: str = "a") -> None:
        """Have another certificate, which ends ``days`` from now."""
        pem = self.authority.site(self.key.public_key(), days=days, name=name)
        (self.state / "certificate.pem").write_bytes(pem)

    def allow(self, *digests: str) -> None:
        """Write the policy: backbones that are allowed."""
        named = ", ".join(f'"m{n}" = "sha256:{one}"' for n, one in enumerate(digests))
        text = f'[model]\nallowed_methods = ["lora"]\nallowed_backbones = {{ {named} }}\n'
        (self.folder / "policy.toml").write_text(text)

    def endpoint(self, endpoint: str) -> None:
        """Write the membership, with another address of the coordinator."""
        pinned = fingerprint(self.authority.pem)
        (self.state / "membership.json").write_text(
            f'{{"federation": "trial", "site": "a", "endpoint": "{endpoint}",'
            f' "fingerprint": "{pinned}", "sites": ["a", "b", "c"]}}'
        )


@dataclass
class Coordinator(services.MembershipServicer):  # type: ignore[misc]
    """Answers GetTime with a clock that is ``ahead`` (seconds), or aborts with ``refuse``.

    ``MANIFEST`` is in its ``store``.
    """

    store: Path
    ahead: float = 0.0
    pause: float = 0.0  # seconds before each piece of a backbone
    refuse: grpc.StatusCode | None = None
    site_names: list[str] = field(default_factory=list)

    def GetTime(self, request: Any, context: Any) -> Any:
        names = context.auth_context().get("x509_common_name", [])
        self.site_names += [name.decode() for name in names]
        if self.refuse:
            context.abort(self.refuse, CANARY)
        return pb.TimeReply(unix_seconds=time.time() + self.ahead)

    @contextmanager
    def serve(self, authority: Authority, *, age: float = 0) -> Iterator[int]:
        """Serve with a certificate by ``authority``, asking for one; the port."""
        server = grpc.server(ThreadPoolExecutor(2))
        services.add_MembershipServicer_to_server(self, server)
        store = BlobStore(self.store)
        store.import_folder(BUILTIN, MANIFEST)
        services.add_BackbonesServicer_to_server(_Slow(store, self), server)
        credentials = grpc.ssl_server_credentials(
            [authority.server(age=age)], authority.pem, require_client_auth=True
        )
        port = server.add_secure_port("0.0.0.0:0", credentials)
        server.start()
        try:
            yield port
        finally:
            server.stop(0).wait()


class _Slow(BackboneService):
    def __init__(self, store: BlobStore, coordinator: Coordinator) -> None:
        super().__init__(store)
        self._coordinator = coordinator

    def GetChunks(self, request: Any, context: Any) -> Iterator[Any]:
        for piece in super().GetChunks(request, context):
            time.sleep(self._coordinator.pause)
            yield piece


def look(site: Site, checks: tuple[Check, ...] = QUICK) -> dict[str, Finding]:
    """All findings by name; whatever they are, the canary is not in them."""
    found = {one.name: one for one in examine(site.file, checks)}
    assert CANARY not in repr(found)
    return found


def states(found: dict[str, Finding]) -> dict[str, str]:
    """The states that are not ok, by name."""
    return {name: one.state for name, one in found.items() if one.state != "ok"}
