"""What this site has as a member of a federation: keys made here, a certificate, the roster.

All of it is in the site's state folder. ``join`` turns a kit into a membership; ``renew`` and
``refresh_roster`` are what the running agent does from time to time.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from fedgraft.client.identity import load_identity, make_identity
from fedgraft.common.certificates import (
    begins,
    expires,
    fingerprint,
    key_to_pem,
    load_key,
    make_csr,
    make_key,
    site_of,
)
from fedgraft.common.channels import open_channel
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.federation import Federation, parse_federation
from fedgraft.common.files import write_private, write_text
from fedgraft.common.kit import Kit
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = ["Membership", "join", "load_membership", "refresh_roster", "renew", "renewal_due"]

PROOF = b"fedgraft-enrol/1\n"
TIMEOUT = 30.0  # seconds for one question
SHARE = 2 / 3  # of a certificate's life, after which it is renewed
HINTS = {
    "token-used": "this kit was used before: if it was not you, tell the coordinator at once",
    "token-wrong": "the kit was renewed since: ask the coordinator for the new one",
    "kit-expired": "ask the coordinator to renew the kit",
    "site-revoked": "the coordinator shut this site out: ask them",
    "too-many-tries": "wait a minute",
}


@dataclass(frozen=True)
class Membership:
    """Facts of ``membership.json`` and where the rest is; nothing in it is secret."""

    federation: str
    site: str
    endpoint: str
    fingerprint: str
    sites: tuple[str, ...]


def load_membership(state: Path) -> Membership:
    """The membership in the folder ``state``.

    Raises:
        InputError: this site has not joined.
    """
    try:
        raw = json.loads((state / "membership.json").read_text(encoding="utf-8"))
        return Membership(**{**raw, "sites": tuple(raw["sites"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"no membership in {state}",
            hint="join first: fedgraft site join NAME.kit --fingerprint ...",
        ) from None


def load_tls_key(state: Path) -> EllipticCurvePrivateKey:
    """The site's P-256 key.

    Raises:
        InputError: it is missing, or others may read it.
    """
    path = state / "tls.key"
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return load_key(path.read_bytes())
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{path} is missing or damaged", hint="join again with a new kit"
        ) from None


def join(kit: Kit, state: Path) -> Membership:
    """Make keys here, have the coordinator certify them, and keep what it gives.

    If it fails, nothing but the keys is left, which the next try uses.

    Raises:
        FedgraftError: the coordinator cannot be reached, or refuses.
        InputError: what it gave is not for us.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(state, 0o700)
    identity = make_identity(state)
    if not (state / "tls.key").exists():
        write_private(state / "tls.key", key_to_pem(make_key()))
    key = load_tls_key(state)
    csr = make_csr(key, kit.site)
    request = pb.EnrolRequest(
        site=kit.site,
        token=kit.token,
        csr=csr,
        identity=identity.public,
        proof=identity.sign(PROOF + kit.site.encode() + b"\n" + csr),
    )
    ca = kit.ca.encode()
    with open_channel(kit.endpoint, ca=ca) as channel:
        reply = _call(services.EnrolmentStub(channel).Enrol, request)
    if site_of(reply.certificate, ca, key.public_key(), datetime.now(UTC)) != kit.site:
        raise InputError("the certificate is for another site", hint="tell the coordinator")
    roster = _checked(reply.roster, kit.site, identity.public.hex(), kit.sites)
    member = Membership(kit.federation, kit.site, kit.endpoint, fingerprint(ca), tuple(kit.sites))
    write_text(state / "ca.pem", kit.ca)
    write_text(state / "certificate.pem", reply.certificate.decode())
    write_text(state / "roster.toml", roster)
    # Last: with it the site has joined.
    write_text(state / "membership.json", json.dumps(asdict(member), indent=1))
    return member


def open_member_channel(state: Path, endpoint: str) -> grpc.Channel:
    """A channel to the coordinator's services with this site's certificate."""
    return open_channel(
        endpoint,
        ca=(state / "ca.pem").read_bytes(),
        key=(state / "tls.key").read_bytes(),
        certificate=(state / "certificate.pem").read_bytes(),
    )


def renewal_due(state: Path, now: datetime) -> bool:
    """Whether two thirds of the certificate's life are behind us."""
    pem = (state / "certificate.pem").read_bytes()
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
        reply = _call(stub.Renew, pb.RenewRequest(csr=make_csr(key, member.site)))
    ca = (state / "ca.pem").read_bytes()
    if site_of(reply.certificate, ca, key.public_key(), datetime.now(UTC)) != member.site:
        raise InputError("the certificate is for another site", hint="tell the coordinator")
    write_text(state / "certificate.pem", reply.certificate.decode())


def refresh_roster(member: Membership, state: Path) -> Federation:
    """Take the keys of sites that joined since; a key that changed is not taken.

    The first key of a site is trusted as the coordinator gives it: it could invent sites. That is
    why the doctor shows the roster's fingerprint, which partners compare with each other by another
    way, and why sites that were not named in the kit are not taken.

    Raises:
        FedgraftError: the coordinator cannot be reached.
        InputError: the roster is not one that this site can accept.
    """
    with open_member_channel(state, member.endpoint) as channel:
        reply = _call(services.MembershipStub(channel).GetRoster, pb.RosterRequest())
    own = load_identity(state).public.hex()
    path = state / "roster.toml"
    before = (
        parse_federation(path.read_text(encoding="utf-8"), str(path)) if path.exists() else None
    )
    text = _checked(reply.roster, member.site, own, member.sites, before)
    if before is None or text != path.read_text(encoding="utf-8"):
        write_text(path, text)
    return parse_federation(text, str(path))


def _checked(
    roster: bytes,
    site: str,
    own: str,
    expected: tuple[str, ...],
    before: Federation | None = None,
) -> str:
    text = roster.decode("utf-8", errors="replace")
    federation = parse_federation(text, "the coordinator's roster")
    if federation.sites.get(site) != own:
        raise InputError(
            "the roster has another key for this site", hint="tell the coordinator: someone lies"
        )
    strangers = sorted(set(federation.sites) - set(expected))
    if strangers:
        raise InputError(
            f"the roster names {strangers[0]}, which the kit does not",
            hint="ask for a new kit that names it, if you agree to it",
        )
    changed = [
        name
        for name, key in federation.sites.items()
        if before and before.sites.get(name, key) != key
    ]
    if changed:
        raise InputError(
            f"the key of {changed[0]} changed",
            hint="ask that site whether it made new keys; then remove its line from roster.toml",
        )
    if before and federation.secure_aggregation != before.secure_aggregation:
        raise InputError("the floor of secure aggregation changed", hint="ask for a new kit")
    return text


def _call(method: Callable[..., Any], request: Any) -> Any:
    """What the coordinator answers; its words are codes, and only those we know are shown."""
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
