"""The keys that this site trusts: the coordinator's roster, and the accepted part of it.

The first key of a site is trusted as the coordinator gives it ("trust on first use"). A coordinator
that lies from the start could put keys of its own in a partner's place and see more than sums.
Therefore the officers of all sites compare ``roster_fingerprint`` with each other over another
channel, once and whenever a site joins. After that, the coordinator cannot lie: an accepted key
stays in ``known.json`` forever, even while its site is not in the roster, and only a person's
``admit`` changes it. A site that neither the kit nor a person has named is not accepted at all.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from fedgraft.client.membership.credentials import (
    ask,
    keep_membership,
    load_membership,
    open_member_channel,
)
from fedgraft.client.membership.identity import load_identity
from fedgraft.client.membership.state_files import AUDIT, ROSTER
from fedgraft.common.errors import InputError
from fedgraft.common.federation.audit_log import Audit
from fedgraft.common.federation.federation_file import (
    Federation,
    Floor,
    dump_federation,
    load_federation,
    parse_federation,
)
from fedgraft.common.files import write_text
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = ["Trust", "accept", "admit", "keep_roster", "refresh_roster", "roster_fingerprint"]

KNOWN = "known.json"
KEY = r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Trust:
    """The facts that a roster must not contradict.

    ``site`` and its ``key`` (hex) are this site's own. ``named`` are the sites that it agreed to,
    ``known`` are the keys that it accepted, and ``floor`` is that of its kit.
    """

    site: str
    key: str
    named: tuple[str, ...]
    known: dict[str, str]
    floor: Floor


def roster_fingerprint(federation: Federation) -> str:
    """Return SHA-256 (hex) of the roster as every site keeps it, for partners to compare."""
    return hashlib.sha256(_text(federation).encode()).hexdigest()


def refresh_roster(state: Path) -> Federation:
    """Take the keys of sites that joined since, and remove the keys of sites that left.

    Raises:
        FedgraftError: the coordinator cannot be reached, or refuses.
        InputError: this site cannot accept the roster; it keeps the roster that it has.
    """
    member = load_membership(state)  # read again: a person may have admitted a site
    with open_member_channel(state, member.endpoint) as channel:
        reply = ask(services.MembershipStub(channel).GetRoster, pb.RosterRequest())
    before = load_federation(state / ROSTER)
    trust = Trust(
        member.site,
        load_identity(state).public.hex(),
        member.sites,
        _known(state, before),
        before.secure_aggregation,
    )
    federation, strangers = accept(reply.roster, trust)
    if strangers:
        raise InputError(
            f"the roster is refused: site-unknown ({', '.join(strangers)})",
            hint="if you agree to it: fedgraft site admit NAME",
        )
    keep_roster(state, federation)
    return federation


def accept(roster: bytes, trust: Trust) -> tuple[Federation, list[str]]:
    """Return the roster of the sites that this site agreed to, and the names of other sites in it.

    Raises:
        InputError: the roster contradicts the facts that this site trusts.
    """
    text = roster.decode("utf-8", errors="replace")
    federation = parse_federation(text, "the coordinator's roster")
    if federation.sites.get(trust.site) != trust.key:
        raise InputError(
            "the roster has another key for this site, or none", hint="ask the coordinator why"
        )
    known = {name: trust.known.get(name, key) for name, key in federation.sites.items()}
    changed = sorted(name for name, key in federation.sites.items() if known[name] != key)
    if changed:
        raise InputError(
            f"the roster is refused: roster-changed (the key of {', '.join(changed)})",
            hint="ask that site, not the coordinator, whether it made new keys; if it did: "
            "fedgraft site admit NAME --key ITS-KEY",
        )
    if federation.secure_aggregation != trust.floor:
        raise InputError(
            "the roster is refused: floor-changed", hint="ask the coordinator for a new kit"
        )
    agreed = {name: key for name, key in federation.sites.items() if name in trust.named}
    return _with_sites(federation, agreed), sorted({*known} - {*agreed})


def keep_roster(state: Path, federation: Federation) -> None:
    """Write the accepted roster; a file that has this content already is not written again."""
    path = state / ROSTER
    known = {**_known(state, None), **federation.sites}
    if known != _known(state, None):
        _write_known(state, known)  # first, so that every key in use is known
    if not path.exists() or path.read_text(encoding="utf-8") != _text(federation):
        write_text(path, _text(federation))


def admit(state: Path, name: str, key: str = "") -> None:
    """Record a person's decision: ``name`` may be in the roster, only with this ``key`` (hex).

    Without a key, the next key that the coordinator gives is accepted, even if another was known
    before. The decision is recorded in the audit first: without a record, nothing is decided.

    Raises:
        AuditError: the decision cannot be recorded.
        InputError: this site has not joined, ``name`` is its own name, or the key is not valid.
    """
    member = load_membership(state)
    if name == member.site or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise InputError(f"{name} is not the name of another site", hint="as the site calls itself")
    if key and not re.fullmatch(KEY, key):
        raise InputError("the key is not 64 hex digits", hint="the public key of that site")
    known = _known(state, load_federation(state / ROSTER))
    facts = {"run": "", "round": 0, "stage": "admit", "policy": "", "direction": ""}
    Audit(state / AUDIT).append(facts | {"decision": "admitted", "site": name, "key": key})
    known.pop(name, None)
    _write_known(state, {**known, **({name: key} if key else {})})
    if name not in member.sites:
        keep_membership(state, replace(member, sites=tuple(sorted({*member.sites, name}))))


def _known(state: Path, roster: Federation | None) -> dict[str, str]:
    """Return every key that was ever accepted; those of ``roster`` if none was noted yet.

    Raises:
        InputError: the file is damaged. Without it, the site would trust any key as a first one.
    """
    path = state / KNOWN
    if not path.exists():
        return dict(roster.sites) if roster else {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not all(re.fullmatch(KEY, key) for key in known.values()):
            raise ValueError
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged", hint="restore it from your backup") from None
    return dict(known)


def _write_known(state: Path, known: dict[str, str]) -> None:
    write_text(state / KNOWN, json.dumps(known, indent=1, sort_keys=True) + "\n")


def _text(federation: Federation) -> str:
    """Return a text that is the same at every site with the same keys."""
    ordered = {name: federation.sites[name] for name in federation.names}
    return dump_federation(_with_sites(federation, ordered))


def _with_sites(federation: Federation, sites: dict[str, str]) -> Federation:
    # A new object: a copy would keep the ids that were computed for the earlier sites.
    return Federation(secure_aggregation=federation.secure_aggregation, sites=sites)
