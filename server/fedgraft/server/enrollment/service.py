"""gRPC: let a site in with its kit's token, and what members ask about themselves.

The site's name in ``Membership`` is what nginx read from the client certificate; nothing but nginx
can reach these services' socket. A refusal is a reason code and nothing more, also where the fault
is ours. Only who holds a kit's token learns how that site stands.
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

CALM = 60.0  # seconds in which there are at most so many of these:
WRONG_TOKENS = 10  # for one site, before it is refused
HEADS = 60  # of one site: each is a line of the coordinator's audit
TOLD = 20  # refusals that have an event of their own
LARGEST_CSR = 4096  # bytes
# A site renews some three times in a certificate's life. All that live are kept, so that revoking
# the site revokes every one of them; their number must then have an end.
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
    """Issues certificates to sites of the registry in ``home``; ``event`` is told what came of it.

    ``event`` gets a kind and facts: ``enrolled``, ``renewed``, ``enrolment-refused`` and
    ``renewal-refused`` with the site, the last two with a ``code``; ``audit-head`` and
    ``audit-cut`` with what a site told of its audit.
    """

    def __init__(self, home: Path, event: Event) -> None:
        self.home, self.event = home, event
        self.registry = Registry(home)
        self._refusals = _Sparing(event)

    def issue(self, name: str, key: ec.EllipticCurvePublicKey, site: Site) -> tuple[bytes, Site]:
        """A certificate for a site, PEM, and the site with it."""
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
        """The roster as it is now."""
        path = self.home / "roster.toml"
        return path.read_bytes() if path.exists() else b""

    def member(self, context: grpc.ServicerContext) -> str:
        """The caller, who is a member.

        Raises:
            _Refused: it is none, or no more.
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
        """End a call that is refused with its code; one that fails says nothing of what failed."""
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
    """Tells of the first few refusals of a minute, and then how many more there were.

    A stranger can be refused as often as he likes, and must not fill the audit with it.
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
    """Lets each site do something ``most`` times a minute; names that are no site's, together."""

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
    """Lets a site in, once for each kit."""

    def __init__(self, home: Path, event: Event) -> None:
        self._issuer = _Issuer(home, event)
        self._pace = _RateLimit(WRONG_TOKENS)

    def Enrol(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See the .proto."""
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
            self._issuer.event("enrolled", site=name)  # what cannot be recorded is not done
        return certificate


class MembershipService(services.MembershipServicer):
    """What a member asks about itself."""

    def __init__(self, home: Path, event: Event) -> None:
        self._issuer = _Issuer(home, event)
        self._heads = _RateLimit(HEADS)

    def Renew(self, request: Any, context: grpc.ServicerContext) -> Any:
        """A new certificate for the same key."""
        name = str(dict(context.invocation_metadata()).get("x-site", ""))
        with self._issuer.answering(context, "renewal-refused", name):
            certificate = self._renew(self._issuer.member(context), request.csr)
            return pb.EnrolReply(certificate=certificate, roster=self._issuer.roster())

    def _renew(self, name: str, csr: bytes) -> bytes:
        key = _read_csr(csr)
        with self._issuer.registry.change() as sites:
            if sites[name].state != "joined":  # since it was looked at
                raise _denied("site-revoked")
            if _base64(key) != sites[name].node_key:
                raise _denied("another-key")
            certificate, sites[name] = self._issuer.issue(name, key, sites[name])
            self._issuer.event("renewed", site=name)
        return certificate

    def GetRoster(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The public keys of all members."""
        with self._issuer.answering(context):
            self._issuer.member(context)
            return pb.RosterReply(roster=self._issuer.roster())

    def ReportHead(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Note the head of a site's audit, so that it cannot be cut off later unseen."""
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
        """Note a head that goes on from the one before, and be loud about one that does not.

        A chain only grows. What comes late of an earlier round of the run is no news.
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
        """The coordinator's clock."""
        return pb.TimeReply(unix_seconds=time.time())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_open(site: Site) -> None:
    """Whether a kit whose token is right still lets anybody in."""
    if site.state == "revoked":
        raise _denied("site-revoked")
    if site.state == "joined":
        raise _denied("token-used")
    if datetime.now(UTC) >= datetime.fromisoformat(site.kit_expires):
        raise _denied("kit-expired")


def _read(request: Any) -> ec.EllipticCurvePublicKey:
    """The key of a request to join that is what it should be."""
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
    raise AssertionError  # abort has raised


def _printable(name: str) -> str:
    return "".join(char for char in name[:64] if char.isalnum() or char in "._-")
