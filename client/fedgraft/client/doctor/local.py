"""The doctor's local checks: files, keys, certificate, data, roster, audit.

Of the data, only counts are shown, and column names if they are certainly names: the first line of
a CSV file without a header is a row.
"""

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from fedgraft.client.membership.credentials import (
    Membership,
    load_membership,
    load_tls_key,
    set_aside,
)
from fedgraft.client.membership.identity import load_identity
from fedgraft.client.membership.roster import roster_fingerprint
from fedgraft.client.membership.state_files import (
    AUDIT,
    BACKBONES,
    CA,
    CERTIFICATE,
    IDENTITY,
    ROSTER,
    TLS_KEY,
)
from fedgraft.client.site_config import SiteConfig, load_site
from fedgraft.common.backbones.blob_store import RESERVE
from fedgraft.common.backbones.manifest import Manifest
from fedgraft.common.federation.audit_log import verify
from fedgraft.common.federation.certificates import begins, expires, load_key, site_of
from fedgraft.common.federation.federation_file import load_federation

__all__ = [
    "FAIL",
    "OK",
    "SKIPPED",
    "WARN",
    "Finding",
    "Patient",
    "audit",
    "certificate",
    "data",
    "disk",
    "keys",
    "membership",
    "policy",
    "roster",
    "rules",
    "site_file",
]

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"
UNKNOWN = 1_000_000_000  # bytes: the room for a backbone that is not known yet
SOON = timedelta(days=1)


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    ``state`` is ok, warn, fail or skipped; ``what`` was seen; ``hint`` may be empty.
    """

    name: str
    state: str
    what: str
    hint: str = ""


class Patient:
    """The site whose ``site.toml`` is at ``path``; values for several checks are read once.

    ``job`` is a job's file or the id of its run; empty if none is to be tried.
    """

    def __init__(self, path: Path, job: str = "") -> None:
        self.path = path
        self.job = job

    @cached_property
    def config(self) -> SiteConfig:
        """The content of ``site.toml``."""
        return load_site(self.path)

    @property
    def state(self) -> Path:
        """The state folder."""
        return Path(self.config.state)

    @cached_property
    def member(self) -> Membership:
        """The content of ``membership.json``."""
        return load_membership(self.state)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.member.endpoint.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def new_kit(self) -> str:
        """The way to another certificate, in words; keys, audit and earlier answers stay."""
        site = self.member.site
        return (
            f"ask the coordinator for a new kit (fedgraft provision renew {site}), then: "
            f"{set_aside(self.state)} && "
            f"fedgraft site join {site}.kit --fingerprint ... --site {self.path}"
        )

    @cached_property
    def answers(self) -> list[tuple[float, float]]:
        """For each GetTime: the lead of this clock over the coordinator's, and the round trip.

        Both are in seconds. The check ``coordinator`` adds them.
        """
        return []


def site_file(patient: Patient) -> Finding:
    """Check that ``site.toml`` can be read."""
    return Finding("site.toml", OK, f"this is {patient.config.name}")


def policy(patient: Patient) -> Finding:
    """Check that ``policy.toml`` can be read."""
    from fedgraft.client.policy.policy_file import load_policy

    if patient.config.policy is None:
        hint = 'add policy = "policy.toml" to site.toml; fedgraft site join writes one'
        return Finding("policy", FAIL, "site.toml names no policy", hint)
    return Finding("policy", OK, f"SHA-256 {load_policy(Path(patient.config.policy)).hash}")


def rules(patient: Patient) -> Finding:
    """Report the policy in plain words."""
    from fedgraft.client.policy.policy_file import load_policy

    words = load_policy(Path(str(patient.config.policy))).in_words()
    return Finding("rules", OK, " ".join(words))


def membership(patient: Patient) -> Finding:
    """Check that the site has joined, under the name that it has in ``site.toml``."""
    member = patient.member
    if member.site != patient.config.name:
        what = f"site.toml says {patient.config.name}, the kit was for {member.site}"
        return Finding("membership", FAIL, what, f'name = "{member.site}" in site.toml')
    what = f"{member.site} of {member.federation}, CA {member.fingerprint}"
    return Finding("membership", OK, what)


def certificate(patient: Patient) -> Finding:
    """Check that the certificate is valid today, from the pinned CA, and for our key."""
    now, again = datetime.now(UTC), patient.new_kit
    for name in (CERTIFICATE, CA, TLS_KEY):
        if not (patient.state / name).exists():
            return Finding("certificate", FAIL, f"{name} is missing", again)
    pem = (patient.state / CERTIFICATE).read_bytes()
    if now < begins(pem):
        hint = "set the clock: timedatectl set-ntp true"
        return Finding("certificate", FAIL, f"valid from {begins(pem):%Y-%m-%d %H:%M} UTC", hint)
    left = expires(pem) - now
    if left <= timedelta(0):
        what = f"expired on {expires(pem):%Y-%m-%d %H:%M} UTC"
        return Finding("certificate", FAIL, what, again)
    ca, key = ((patient.state / name).read_bytes() for name in (CA, TLS_KEY))
    named = site_of(pem, ca, load_key(key).public_key(), now)
    if named != patient.member.site:
        return Finding("certificate", FAIL, f"it is for {named}", again)
    if left < SOON:
        what = f"expires in {left.total_seconds() / 3600:.1f} hours"
        hint = f"start the agent, which renews it (fedgraft site run); once it expired, {again}"
        return Finding("certificate", WARN, what, hint)
    return Finding("certificate", OK, f"good for {left.total_seconds() / 86400:.1f} days")


def keys(patient: Patient) -> Finding:
    """Check that only this user may use the private keys (0600) and the state folder (0700)."""
    state, again = patient.state, patient.new_kit
    for path in (state / IDENTITY, state / TLS_KEY):
        if not path.exists():
            return Finding("keys", FAIL, f"{path} is missing", again)
        if mode := path.stat().st_mode & 0o077:
            what = f"{path} is open to other users (0{0o600 | mode:o})"
            return Finding("keys", FAIL, what, f"chmod 600 {path}")
    public = load_identity(state).public.hex()  # its error says what is wrong
    load_tls_key(state)
    mode = state.stat().st_mode & 0o777
    if mode & 0o022:
        what = f"other users may put files into {state} (0{mode:o})"
        return Finding("keys", FAIL, what, f"chmod 700 {state}")
    if mode & 0o077:
        what = f"other users may look into {state} (0{mode:o})"
        return Finding("keys", WARN, what, f"chmod 700 {state}")
    what = f"private keys are this user's alone; this site's public key is {public}"
    return Finding("keys", OK, what)


def disk(patient: Patient) -> Finding:
    """Check the room for another backbone as large as the largest here, or for an unknown one."""
    state = patient.state
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    free, largest = shutil.disk_usage(there).free, _largest_backbone(state)
    wanted = max(largest, RESERVE) if largest else UNKNOWN
    what = f"{_gigabytes(free)} free"
    if free >= wanted:
        return Finding("disk", OK, what)
    why = "another backbone of this size" if largest else "a backbone"
    hint = f"make room where {there} is"
    return Finding("disk", FAIL, f"{what}; {why} needs {_gigabytes(wanted)}", hint)


def _largest_backbone(state: Path) -> int:
    """Return the bytes of the largest backbone that is here; 0 without any."""
    manifests = (state / BACKBONES / "manifests").glob("*.json")
    return max((Manifest.from_json(path.read_bytes()).size for path in manifests), default=0)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def roster(patient: Patient) -> Finding:
    """Report the fingerprint of all sites' keys in the coordinator's roster, for comparison."""
    federation = load_federation(patient.state / ROSTER)
    own = load_identity(patient.state).public.hex()
    if federation.sites.get(patient.member.site) != own:
        hint = "tell the coordinator and the other sites: someone lies, or keys were mixed up"
        return Finding("roster", FAIL, "it has another key for this site", hint)
    joined = f"{len(federation.sites)} of {len(patient.member.sites)} sites have joined"
    what = f"SHA-256 {roster_fingerprint(federation)}; {joined}"
    return Finding("roster", OK, what, "compare it with the other sites by another way")


def audit(patient: Patient) -> Finding:
    """Check that each line of the audit follows from the line before."""
    path = patient.state / AUDIT
    if not path.exists():
        return Finding("audit", OK, "no line yet")
    return Finding("audit", OK, f"{verify(path)} lines, each follows from the one before")


def data(patient: Patient) -> Finding:
    """Check that the files of ``site.toml`` can be read: rows of each split, columns."""
    from fedgraft.client.doctor.data_summary import survey

    said: list[str] = []
    problems: list[tuple[str, str, str]] = []
    chosen = patient.config.data
    for split in ("train", "validation", "test"):
        if place := getattr(chosen, split):
            seen = survey(place, chosen.columns)
            said.append(f"{split} {seen.what}")
            problems += [(seen.state, split, seen.hint)] if seen.hint else []
    worst = FAIL if any(one[0] == FAIL for one in problems) else WARN if problems else OK
    hints = "; ".join(f"data.{split}: {hint}" for _, split, hint in problems)
    return Finding("data", worst, "; ".join(said), hints)
