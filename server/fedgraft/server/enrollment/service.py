"""gRPC services: enrol a site with its kit's token, and answer requests of members.

nginx reads the site's name in ``Membership`` from the client certificate; only nginx can reach the
socket of these services. A refusal is only a reason code, also if the fault is ours. Only the
holder of a kit's token learns the state of that site.
"""

import base64
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft.common.federation.certificates import (
    expires,
    issue_site,
    load_key,
    public_pem,
    read_csr,
    serial,
)
from fedgraft.common.federation.kit import enrolment_statement
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.common.secagg.errors import StatementError
from fedgraft.common.secagg.keys import verify
from fedgraft.server.enrollment.provision import load_federation_spec
from fedgraft.server.enrollment.registry import NO_AUDIT, Certificate, Registry, Site, hash_token

__all__ = ["EnrolmentService", "MembershipService"]

CALM = 60.0  # seconds; the next three limits are per this time
WRONG_TOKENS = 10  # for one site; further tries are refused
HEADS = 60  # of one site; each is a line of the coordinator's audit
TOLD = 20  # refusals that get a separate event
LARGEST_CSR = 4096  # bytes
# A site renews about three times in a certificate's lifetime. The registry keeps all certificates
# in force, so that revoking the site revokes each of them. Therefore their number needs a limit.
MOST_LIVE = 64
Event = Callable[..., None]


class _Refused(Exception):
    def __init__(self, code: str, status: grpc.StatusCode) -> None:
        super().__init__(code)
        self.code, self.status = code, status


def _bad_request() -> _Refused:
    return _Refused("bad-request", grpc.StatusCode.INVALID_ARGUMENT)


def _denied(code: str) -> _Refused:
    return _Refused(code, grpc.StatusCode.PERMISSION_DENIED)


class _Issuer:
    """Issues certificates to sites of the registry in ``home``, and reports to ``event``.

    ``event`` gets a kind and facts. The kinds ``enrolled``, ``renewed``, ``enrolment-refused`` and
    ``renewal-refused`` have the site, and the last two also a ``code``. The kinds ``audit-head``
    and ``audit-cut`` have the head that a site reported of its audit.
    """

    def __init__(self, home: Path, event: Event) -> None:
        self.home, self.event = home, event
        self.registry = Registry(home)
        self._refusals = _Sparing(event)

    def issue(self, name: str, key: ec.EllipticCurvePublicKey, site: Site) -> tuple[bytes, Site]:
        """Return a new certificate for a site, PEM, and the site with that certificate."""
        now = datetime.now(UTC)
        before = site.without_ended(now)
        if len(before.certificates) >= MOST_LIVE:
            raise _Refused("too-many-certificates", grpc.StatusCode.RESOURCE_EXHAUSTED)
        lifetime = load_federation_spec(
            self.home / "federation.toml"
        ).federation.certificate_lifetime
        pem = issue_site(
            (self.home / "ca.pem").read_bytes(),
            load_key((self.home / "ca.key").read_bytes()),
            key,
            site=name,
            now=now,
            lifetime=timedelta(seconds=lifetime),
        )
        new = Certificate(serial(pem), expires(pem).isoformat())
        return pem, replace(before, certificates=(*before.certificates, new))

    def roster(self) -> bytes:
        """Return the current roster; empty if there is none."""
        path = self.home / "roster.toml"
        return path.read_bytes() if path.exists() else b""

    def member(self, context: grpc.ServicerContext) -> str:
        """Return the name of the caller, if it is a member.

        Raises:
            _Refused: the caller is not a member, or no longer one.
        """
        name = str(dict(context.invocation_metadata()).get("x-site", ""))
        if not name:
            raise _Refused("no-certificate", grpc.StatusCode.UNAUTHENTICATED)
        if self.registry.sites().get(name, Site()).state != "joined":
            raise _denied("site-revoked")
        return name

    @contextmanager
    def answering(
        self, context: grpc.ServicerContext, refusal: str = "", site: str = ""
    ) -> Iterator[None]:
        """End a refused call with its code, and a failed call with the code ``fault`` alone."""
        try:
            yield
            return
        except _Refused as error:
            refused = error
        except Exception:
            refused = _Refused("fault", grpc.StatusCode.INTERNAL)
            refusal = refusal or "fault"
        if refusal:
            self._refusals.tell(refusal, site=_printable(site), code=refused.code)
        _refuse(context, refused)


class _Sparing:
    """Reports the first few refusals of a minute, and later the number of the others.

    A stranger can cause any number of refusals, and must not fill the audit with them.
    """

    def __init__(self, event: Event) -> None:
        self._event, self._lock = event, threading.Lock()
        self._begun, self._count = time.monotonic(), 0

    def tell(self, kind: str, **facts: Any) -> None:
        with self._lock:
            untold = 0
            if time.monotonic() - self._begun >= CALM:
                untold = max(self._count - TOLD, 0)
                self._begun, self._count = time.monotonic(), 0
            self._count += 1
            told = self._count <= TOLD
        if untold:
            self._event("more-refused", count=untold)
        if told:
            self._event(kind, **facts)


class _RateLimit:
    """Lets each site do something ``most`` times a minute; unknown names share one limit."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._times: dict[str, list[float]] = {}

    def check(self, name: str) -> None:
        with self._lock:
            recent = [at for at in self._times.get(name, []) if time.monotonic() - at < CALM]
            self._times[name] = recent
        if len(recent) >= self._most:
            raise _Refused("too-many-tries", grpc.StatusCode.RESOURCE_EXHAUSTED)

    def note(self, name: str) -> None:
        with self._lock:
            self._times.setdefault(name, []).append(time.monotonic())


class EnrolmentService(services.EnrolmentServicer):
    """Enrols a site, once for each kit."""

    def __init__(self, home: Path, event: Event) -> None:
        self._issuer = _Issuer(home, event)
        self._pace = _RateLimit(WRONG_TOKENS)

    def Enrol(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Enrol a site; the .proto file describes request and reply."""
        with self._issuer.answering(context, "enrolment-refused", request.site):
            certificate = self._enrol(request)
            return pb.EnrolReply(certificate=certificate, roster=self._issuer.roster())

    def _enrol(self, request: Any) -> bytes:
        key = _read(request)
        name, node_key = request.site, _base64(key)
        with self._issuer.registry.change() as sites:
            site = sites.get(name, Site())
            counted = name if name in sites else ""
            self._pace.check(counted)
            if not hmac.compare_digest(site.token, hash_token(request.token)):
                self._pace.note(counted)
                raise _denied("token-wrong")
            _check_open(site)
            if any(
                node_key == other.node_key or request.identity.hex() == other.identity
                for another, other in sites.items()
                if another != name
            ):
                raise _bad_request()
            certificate, issued = self._issuer.issue(name, key, site)
            sites[name] = replace(
                issued,
                state="joined",
                node_key=node_key,
                identity=request.identity.hex(),
                joined=_now(),
                **({} if site.identity == request.identity.hex() else NO_AUDIT),
            )
            self._issuer.event("enrolled", site=name)  # if this fails, nothing is written
        return certificate


class MembershipService(services.MembershipServicer):
    """Answers the requests of members."""

    def __init__(self, home: Path, event: Event) -> None:
        self._issuer = _Issuer(home, event)
        self._heads = _RateLimit(HEADS)

    def Renew(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Return a new certificate for the same key, and the roster."""
        name = str(dict(context.invocation_metadata()).get("x-site", ""))
        with self._issuer.answering(context, "renewal-refused", name):
            certificate = self._renew(self._issuer.member(context), request.csr)
            return pb.EnrolReply(certificate=certificate, roster=self._issuer.roster())

    def _renew(self, name: str, csr: bytes) -> bytes:
        key = _read_csr(csr)
        with self._issuer.registry.change() as sites:
            if sites[name].state != "joined":  # revoked since the check in ``member``
                raise _denied("site-revoked")
            if _base64(key) != sites[name].node_key:
                raise _denied("another-key")
            certificate, sites[name] = self._issuer.issue(name, key, sites[name])
            self._issuer.event("renewed", site=name)
        return certificate

    def GetRoster(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Return the roster, which holds the public keys of all members."""
        with self._issuer.answering(context):
            self._issuer.member(context)
            return pb.RosterReply(roster=self._issuer.roster())

    def ReportHead(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Record the head of a site's audit, so that cutting the audit later is noticed."""
        with self._issuer.answering(context):
            name = self._issuer.member(context)
            if len(request.head) != 64 or not set(request.head) <= set("0123456789abcdef"):
                raise _bad_request()
            self._heads.check(name)
            self._heads.note(name)
            with self._issuer.registry.change() as sites:
                self._note_head(name, request, sites)
            return pb.HeadReply()

    def _note_head(self, name: str, request: Any, sites: dict[str, Site]) -> None:
        """Record a head: as ``audit-head`` if it continues the last one, else as ``audit-cut``.

        A chain only grows, so a head with fewer or other lines shows a cut. A late head of an
        earlier round of the same run is ignored.
        """
        before, run = sites[name], _printable(request.run)
        fewer = request.lines < before.audit_lines
        if fewer and run == before.audit_run and request.round < before.audit_round:
            return
        other = request.lines == before.audit_lines and request.head != before.audit_head
        cut = fewer or (other and before.audit_head != "")
        sites[name] = replace(
            before,
            audit_lines=request.lines,
            audit_head=request.head,
            audit_run=run,
            audit_round=request.round,
            audit_time=_now(),
            audit_lost=max(before.audit_lost, before.audit_lines) if cut else before.audit_lost,
        )
        facts = {"run": run, "round": request.round, "lines": request.lines, "head": request.head}
        known = {"known_lines": before.audit_lines, "known_head": before.audit_head} if cut else {}
        self._issuer.event("audit-cut" if cut else "audit-head", site=name, **facts, **known)

    def GetTime(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Return the time of the coordinator's clock, Unix seconds."""
        return pb.TimeReply(unix_seconds=time.time())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_open(site: Site) -> None:
    """Check that a kit with the right token can still enrol its site; raise _Refused if not."""
    if site.state == "revoked":
        raise _denied("site-revoked")
    if site.state == "joined":
        raise _denied("token-used")
    if datetime.now(UTC) >= datetime.fromisoformat(site.kit_expires):
        raise _denied("kit-expired")


def _read(request: Any) -> ec.EllipticCurvePublicKey:
    """Return the key of an enrolment request; raise _Refused if the request is not valid."""
    key = _read_csr(request.csr)
    try:
        verify(request.identity, request.proof, enrolment_statement(request.site, request.csr))
    except (ValueError, StatementError):
        raise _bad_request() from None
    return key


def _read_csr(csr: bytes) -> ec.EllipticCurvePublicKey:
    try:
        if len(csr) > LARGEST_CSR:
            raise ValueError
        return read_csr(csr)
    except ValueError:
        raise _bad_request() from None


def _base64(key: ec.EllipticCurvePublicKey) -> str:
    return base64.b64encode(public_pem(key)).decode()


def _refuse(context: grpc.ServicerContext, error: _Refused) -> NoReturn:
    context.abort(error.status, error.code)
    raise AssertionError  # not reached, because abort raises


def _printable(name: str) -> str:
    return "".join(char for char in name[:64] if char.isalnum() or char in "._-")
