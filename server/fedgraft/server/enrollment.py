"""gRPC: let a site in with its kit's token, and what members ask about themselves.

The site's name in ``Membership`` is what nginx read from the client certificate; nothing but nginx
can reach these services' socket. A refusal is a reason code and nothing more.
"""

import base64
import hmac
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft.common.certificates import issue_site, load_key, public_pem, read_csr, serial
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.common.secagg.errors import StatementError
from fedgraft.common.secagg.keys import verify
from fedgraft.server.provision import load_plan
from fedgraft.server.registry import Registry, Site, hash_token

__all__ = ["PROOF", "Enrolment", "Membership"]

PROOF = b"fedgraft-enrol/1\n"
WRONG_TOKENS, CALM = 10, 60.0  # so many wrong tokens for a site, and it is refused so many seconds
KEPT_SERIALS = 64
Event = Callable[..., None]


class _Refused(Exception):
    def __init__(self, code: str, status: grpc.StatusCode) -> None:
        super().__init__(code)
        self.code, self.status = code, status


class _Issuer:
    """Issues certificates to sites of the registry in ``home``."""

    def __init__(self, home: Path, event: Event) -> None:
        self.home, self.event = home, event
        self.registry = Registry(home)

    def issue(self, name: str, key: ec.EllipticCurvePublicKey) -> bytes:
        """A certificate for a site, PEM."""
        lifetime = load_plan(self.home / "federation.toml").federation.certificate_lifetime
        return issue_site(
            (self.home / "ca.pem").read_bytes(),
            load_key((self.home / "ca.key").read_bytes()),
            key,
            site=name,
            now=datetime.now(UTC),
            lifetime=timedelta(seconds=lifetime),
        )

    def roster(self) -> bytes:
        """The roster as it is now."""
        path = self.home / "roster.toml"
        return path.read_bytes() if path.exists() else b""


class Enrolment(services.EnrolmentServicer):
    """Lets a site in, once for each kit."""

    def __init__(self, home: Path, event: Event) -> None:
        self._issuer = _Issuer(home, event)
        self._wrong: dict[str, list[float]] = {}

    def Enrol(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See the .proto."""
        event = self._issuer.event
        try:
            reply = self._enrol(request)
        except _Refused as error:
            event("enrolment-refused", site=_printable(request.site), code=error.code)
            _refuse(context, error)
        event("enrolled", site=request.site)
        return reply

    def _enrol(self, request: Any) -> Any:
        key = _read(request)
        name = request.site
        self._check_pace(name)
        with self._issuer.registry.change() as sites:
            self._check_token(sites.get(name, Site()), name, request.token)
            certificate = self._issuer.issue(name, key)
            before = sites[name]
            sites[name] = replace(
                before,
                state="joined",
                token="",
                node_key=base64.b64encode(public_pem(key)).decode(),
                identity=request.identity.hex(),
                serials=(*before.serials, serial(certificate))[-KEPT_SERIALS:],
                joined=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        return pb.EnrolReply(certificate=certificate, roster=self._issuer.roster())

    def _check_pace(self, name: str) -> None:
        recent = [at for at in self._wrong.get(name, []) if time.monotonic() - at < CALM]
        self._wrong[name] = recent
        if len(recent) >= WRONG_TOKENS:
            raise _Refused("too-many-tries", grpc.StatusCode.RESOURCE_EXHAUSTED)

    def _check_token(self, site: Site, name: str, token: str) -> None:
        if not hmac.compare_digest(site.token, hash_token(token)):
            self._wrong.setdefault(name, []).append(time.monotonic())
            code = "token-wrong"
            if site.state != "invited":
                code = "site-revoked" if site.state == "revoked" else "token-used"
            raise _Refused(code, grpc.StatusCode.PERMISSION_DENIED)
        if datetime.now(UTC) >= datetime.fromisoformat(site.kit_expires):
            raise _Refused("kit-expired", grpc.StatusCode.PERMISSION_DENIED)


class Membership(services.MembershipServicer):
    """What a member asks about itself."""

    def __init__(self, home: Path, event: Event) -> None:
        self._issuer = _Issuer(home, event)

    def Renew(self, request: Any, context: grpc.ServicerContext) -> Any:
        """A new certificate for the same key."""
        name = _caller(context)
        try:
            with self._issuer.registry.change() as sites:
                certificate = self._renew(sites, name, request.csr)
        except _Refused as error:
            self._issuer.event("renewal-refused", site=name, code=error.code)
            _refuse(context, error)
        self._issuer.event("renewed", site=name)
        return pb.EnrolReply(certificate=certificate, roster=self._issuer.roster())

    def _renew(self, sites: dict[str, Site], name: str, csr: bytes) -> bytes:
        site = sites.get(name, Site())
        if site.state != "joined":
            raise _Refused("site-revoked", grpc.StatusCode.PERMISSION_DENIED)
        try:
            key = read_csr(csr)
        except ValueError:
            raise _Refused("bad-request", grpc.StatusCode.INVALID_ARGUMENT) from None
        if base64.b64encode(public_pem(key)).decode() != site.node_key:
            raise _Refused("another-key", grpc.StatusCode.PERMISSION_DENIED)
        certificate = self._issuer.issue(name, key)
        serials = (*site.serials, serial(certificate))[-KEPT_SERIALS:]
        sites[name] = replace(site, serials=serials)
        return certificate

    def GetRoster(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The public keys of all members."""
        return pb.RosterReply(roster=self._issuer.roster())

    def ReportHead(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Note the head of a site's audit, so that it cannot be cut off later unseen."""
        if len(request.head) != 64 or not set(request.head) <= set("0123456789abcdef"):
            _refuse(context, _Refused("bad-request", grpc.StatusCode.INVALID_ARGUMENT))
        self._issuer.registry.report(_caller(context), request.lines, request.head)
        return pb.HeadReply()

    def GetTime(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The coordinator's clock."""
        return pb.TimeReply(unix_seconds=time.time())


def _read(request: Any) -> ec.EllipticCurvePublicKey:
    """The key of a request to join that is what it should be."""
    try:
        key = read_csr(request.csr)
        verify(request.identity, request.proof, PROOF + request.site.encode() + b"\n" + request.csr)
    except (ValueError, StatementError):
        raise _Refused("bad-request", grpc.StatusCode.INVALID_ARGUMENT) from None
    return key


def _caller(context: grpc.ServicerContext) -> str:
    found = dict(context.invocation_metadata()).get("x-site", "")
    if not found:
        _refuse(context, _Refused("no-certificate", grpc.StatusCode.UNAUTHENTICATED))
    return str(found)


def _refuse(context: grpc.ServicerContext, error: _Refused) -> NoReturn:
    context.abort(error.status, error.code)
    raise AssertionError  # abort has raised


def _printable(name: str) -> str:
    return "".join(char for char in name[:64] if char.isalnum() or char in "._-")
