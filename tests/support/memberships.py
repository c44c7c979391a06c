"""A coordinator's enrolment and membership services over real TLS, without nginx.

Two ports stand in for nginx: one that asks for no client certificate and serves enrolment, one that
does and tells the services the certificate's name as ``x-site``.
"""

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import tomli_w

from fedgraft.client.membership.credentials import keep_membership
from fedgraft.client.membership.join import Joined, join
from fedgraft.common.federation.certificates import make_csr, make_key
from fedgraft.common.federation.kit import Kit, enrolment_statement, open_kit
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.common.secagg.keys import Identity
from fedgraft.server.enrollment.provision import found
from fedgraft.server.enrollment.service import EnrolmentService, MembershipService

__all__ = ["Coordinator", "code_of", "enrolment_of", "open_federation", "write_plan"]

NAMES = ("hospital-a", "hospital-b", "hospital-c")


@dataclass
class Coordinator:
    """Where it is and what it noted."""

    folder: Path
    fingerprint: str
    port: int
    member_port: int
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "coordinator"

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    def kit(self, name: str) -> Kit:
        return open_kit(self.kits / f"{name}.kit", self.fingerprint, datetime.now(UTC))

    def join(self, name: str, state: Path | None = None) -> Joined:
        """Have a site join, and point it to the members' port."""
        state = state or self.state(name)
        joined = join(self.kit(name), state, datetime.now(UTC))
        member = replace(joined.membership, endpoint=f"127.0.0.1:{self.member_port}")
        keep_membership(state, member)
        return joined

    def state(self, name: str) -> Path:
        return self.folder / name / "state"

    def stranger(self) -> grpc.Channel:
        return open_channel(f"127.0.0.1:{self.port}", (self.home / "ca.pem").read_bytes())


class _Named:
    """A call's context with what nginx adds."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, str]]:
        (name,) = self._context.auth_context()["x509_common_name"]
        return [("x-site", name.decode())]


def _named(context: Any) -> Any:
    return _Named(context)


class _Behind(MembershipService):
    def Renew(self, request: Any, context: Any) -> Any:
        return super().Renew(request, _named(context))

    def GetRoster(self, request: Any, context: Any) -> Any:
        return super().GetRoster(request, _named(context))

    def ReportHead(self, request: Any, context: Any) -> Any:
        return super().ReportHead(request, _named(context))


def write_plan(
    folder: Path, names: Sequence[str] = NAMES, *, port: int = 8443, **more: object
) -> Path:
    """A ``federation.toml``; ``more`` goes into ``[federation]``."""
    about = {"name": "trial", "endpoint": f"127.0.0.1:{port}", "sites": list(names), **more}
    path = folder / "federation.toml"
    path.write_text(tomli_w.dumps({"federation": about}))
    return path


@contextmanager
def open_federation(
    folder: Path, names: Sequence[str] = NAMES, **more: object
) -> Iterator[Coordinator]:
    """Found a federation in ``folder`` and serve it."""
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, member_port = (one.getsockname()[1] for one in ports)
    for one in ports:
        one.close()
    home = folder / "coordinator"
    made = found(write_plan(folder, names, port=port, **more), home, folder / "kits")
    coordinator = Coordinator(folder, made.fingerprint, port, member_port)

    def note(kind: str, **facts: Any) -> None:
        coordinator.events.append({"event": kind, **facts})

    pair = [((home / "server.key").read_bytes(), (home / "server.pem").read_bytes())]
    server = grpc.server(ThreadPoolExecutor(16))
    services.add_EnrolmentServicer_to_server(EnrolmentService(home, note), server)
    services.add_MembershipServicer_to_server(_Behind(home, note), server)
    server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials(pair))
    mutual = grpc.ssl_server_credentials(pair, (home / "ca.pem").read_bytes(), True)
    server.add_secure_port(f"127.0.0.1:{member_port}", mutual)
    server.start()
    try:
        yield coordinator
    finally:
        server.stop(0).wait()


def enrolment_of(kit: Kit, **changes: Any) -> pb.EnrolRequest:
    """A request to join with new keys; ``key``, ``identity`` and fields can be others."""
    identity = changes.pop("identity", None) or Identity.generate()
    site = changes.get("site", kit.site)
    csr = make_csr(changes.pop("key", None) or make_key(), kit.site)
    facts = {"site": site, "token": kit.token, "csr": csr, "identity": identity.public}
    facts["proof"] = identity.sign(enrolment_statement(site, csr))
    return pb.EnrolRequest(**(facts | changes))


def code_of(error: grpc.RpcError) -> tuple[str, str]:
    """Status and details: all that a refused caller learns."""
    return error.code().name, str(error.details())
