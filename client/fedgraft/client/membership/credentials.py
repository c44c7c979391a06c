"""The credentials of this site in a federation: a key that was made here, and its certificate.

They are in the site's state folder. ``join.py`` makes them from a kit. The running agent calls
``renew``, and ``refresh_roster`` of ``roster.py``, from time to time.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from fedgraft.client.membership.state_files import CA, CERTIFICATE, MEMBERSHIP, TLS_KEY
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.federation.certificates import begins, expires, load_key, make_csr, site_of
from fedgraft.common.files import write_text
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = [
    "Membership",
    "ask",
    "keep_membership",
    "load_membership",
    "load_tls_key",
    "open_member_channel",
    "renew",
    "renewal_due",
    "set_aside",
]

TIMEOUT = 30.0  # seconds for one request
SHARE = 2 / 3  # of a certificate's life; after it, the certificate is renewed
HINTS = {
    "token-used": "the kit was used before: if not by you, tell the coordinator at once; if your "
    "own try was cut short, have it renewed",
    "token-wrong": "the kit was renewed since: ask the coordinator for the new one",
    "kit-expired": "ask the coordinator to renew the kit",
    "site-revoked": "the coordinator shut this site out: ask them",
    "too-many-tries": "wait a minute",
    "too-many-certificates": "wait until some have ended; look for what renews them so often",
    "another-key": f"restore {TLS_KEY}, or ask the coordinator for a new kit and join again",
    "bad-request": "one kit, one folder: another site may have joined from this one",
}


@dataclass(frozen=True)
class Membership:
    """The facts in ``membership.json``; none of them is secret."""

    federation: str
    site: str
    endpoint: str
    fingerprint: str
    sites: tuple[str, ...]


def load_membership(state: Path) -> Membership:
    """Return the membership in the folder ``state``.

    Raises:
        InputError: this site has not joined.
    """
    try:
        raw = json.loads((state / MEMBERSHIP).read_text(encoding="utf-8"))
        return Membership(**{**raw, "sites": tuple(raw["sites"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"no membership in {state}",
            hint="join first: fedgraft site join NAME.kit --fingerprint ...",
        ) from None


def load_tls_key(state: Path) -> EllipticCurvePrivateKey:
    """Return the site's P-256 key.

    Raises:
        InputError: the key is missing, or others may read it.
    """
    path = state / TLS_KEY
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return load_key(path.read_bytes())
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{path} is missing or damaged", hint="join again with a new kit"
        ) from None


def keep_membership(state: Path, member: Membership) -> None:
    """Write ``membership.json``; from then on, the site has joined."""
    write_text(state / MEMBERSHIP, json.dumps(asdict(member), indent=1) + "\n")


def set_aside(state: Path) -> str:
    """Return the shell command after which a site can join again.

    The state folder itself stays: it has the record of the site's answers, which must not be lost.
    """
    path = state / MEMBERSHIP
    return f"mv {path} {path}.old"


def open_member_channel(state: Path, endpoint: str) -> grpc.Channel:
    """Return a channel to the coordinator's services with this site's certificate."""
    return open_channel(
        endpoint,
        ca=(state / CA).read_bytes(),
        key=(state / TLS_KEY).read_bytes(),
        certificate=(state / CERTIFICATE).read_bytes(),
    )


def renewal_due(state: Path, now: datetime) -> bool:
    """Return whether two thirds of the certificate's life are over."""
    pem = (state / CERTIFICATE).read_bytes()
    start, end = begins(pem), expires(pem)
    return now >= start + timedelta(seconds=SHARE * (end - start).total_seconds())


def renew(member: Membership, state: Path) -> None:
    """Have the certificate renewed, for the same key.

    Raises:
        FedgraftError: the coordinator cannot be reached, or refuses.
    """
    key = load_tls_key(state)
    with open_member_channel(state, member.endpoint) as channel:
        stub = services.MembershipStub(channel)
        reply = ask(stub.Renew, pb.RenewRequest(csr=make_csr(key, member.site)))
    ca = (state / CA).read_bytes()
    if site_of(reply.certificate, ca, key.public_key(), datetime.now(UTC)) != member.site:
        raise InputError("the certificate is for another site", hint="tell the coordinator")
    write_text(state / CERTIFICATE, reply.certificate.decode())


def ask(method: Callable[..., Any], request: Any) -> Any:
    """Return the coordinator's answer. Its error texts are codes; only known ones are shown."""
    try:
        return method(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        status, code = error.code(), str(error.details() or "")
    if code in HINTS:
        raise FedgraftError(f"the coordinator refuses: {code}", hint=HINTS[code])
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise FedgraftError(
            "the coordinator does not answer, or its certificate is not the federation's",
            hint="check endpoint, firewall and proxy: fedgraft site doctor",
        )
    raise FedgraftError(
        f"the coordinator refuses: {status.name.lower().replace('_', '-')}",
        hint="fedgraft site doctor",
    )
