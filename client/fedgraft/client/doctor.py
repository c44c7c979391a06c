"""What a site can find out before it takes part: each check says what it saw and what mends it.

Nothing is changed, and of the data only whether its files are there is looked at. What one check
finds never stops the others; one that needs another that failed is skipped.
"""

import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from glob import glob
from pathlib import Path

import grpc

from fedgraft.client.agent import make_tls
from fedgraft.client.membership import Membership, load_membership, open_member_channel
from fedgraft.client.policy import load_policy
from fedgraft.client.site import SiteConfig, load_site
from fedgraft.common.audit import verify
from fedgraft.common.certificates import expires
from fedgraft.common.errors import FedgraftError
from fedgraft.common.files import hash_file
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = ["Finding", "examine"]

AHEAD, BEHIND = 2.0, 60.0  # seconds that a site's clock may be off: Flower refuses requests beyond
ROOM = 1_000_000_000  # bytes
PATIENCE = 10.0  # seconds
OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


@dataclass(frozen=True)
class Finding:
    """One check: its ``name``, ``state`` (ok, warning, failed, skipped), what was seen, a hint."""

    name: str
    state: str
    what: str
    hint: str = ""


def examine(path: Path) -> Iterator[Finding]:
    """The findings about the site whose ``site.toml`` is at ``path``, as they are made."""
    try:
        config = load_site(path)
    except FedgraftError as error:
        yield Finding("site.toml", FAILED, str(error), error.hint)
        return
    yield Finding("site.toml", OK, f"this is {config.name}")
    state = Path(config.state)
    yield _tried("data", lambda: _data(config))
    yield _tried("policy", lambda: _policy(config))
    yield _tried("disk", lambda: _disk(state))
    yield _tried("device", lambda: _device(config))
    try:
        member = load_membership(state)
    except FedgraftError as error:
        yield Finding("membership", FAILED, str(error), error.hint)
        return
    same = member.site == config.name
    yield Finding(
        "membership",
        OK if same else FAILED,
        f"{member.site} of {member.federation}, CA {member.fingerprint[:16]}...",
        "" if same else f'name = "{member.site}" in site.toml, as in the kit',
    )
    yield _tried("keys", lambda: _keys(state))
    yield _tried("certificate", lambda: _certificate(state))
    yield _tried("roster", lambda: _roster(state))
    yield _tried("audit", lambda: _audit(state))
    yield from _connection(member, state)


def _tried(name: str, check: Callable[[], tuple[str, str, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except FedgraftError as error:
        return Finding(name, FAILED, str(error), error.hint)
    except Exception as error:  # a check that breaks says so, and the next is made
        return Finding(name, FAILED, f"could not be checked ({type(error).__name__})")


def _data(config: SiteConfig) -> tuple[str, str, str]:
    for split in ("train", "validation", "test"):
        place = getattr(config.data, split)
        if place and not (Path(place).exists() or glob(place)):
            return FAILED, f"data.{split} is not there", f"mend data.{split} in site.toml"
    return OK, "the files of site.toml are there", ""


def _policy(config: SiteConfig) -> tuple[str, str, str]:
    if config.policy is None:
        return FAILED, "there is no policy", 'policy = "policy.toml" in site.toml; join writes one'
    return OK, " ".join(load_policy(Path(config.policy)).in_words()), ""


def _disk(state: Path) -> tuple[str, str, str]:
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    words = f"{free / 1e9:,.1f} GB free"
    return (OK, words, "") if free >= ROOM else (FAILED, words, "make room: a backbone needs it")


def _device(config: SiteConfig) -> tuple[str, str, str]:
    import torch

    from fedgraft.common.workbench import choose_device

    device = choose_device(config.device)
    if device.type != "cuda":
        return OK, f"{device.type}, torch {torch.__version__}", ""
    facts = torch.cuda.get_device_properties(device)
    half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return OK, f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {half}", ""


def _keys(state: Path) -> tuple[str, str, str]:
    for name in ("identity.pem", "tls.key"):
        path = state / name
        if not path.exists():
            return FAILED, f"{path} is missing", "join again with a new kit"
        if path.stat().st_mode & 0o077:
            return FAILED, f"{path} can be read by others", f"chmod 600 {path}"
    if state.stat().st_mode & 0o077:
        return WARNING, f"others may look into {state}", f"chmod 700 {state}"
    return OK, "private keys are this user's alone", ""


def _certificate(state: Path) -> tuple[str, str, str]:
    left = expires((state / "certificate.pem").read_bytes()) - datetime.now(UTC)
    if left <= timedelta(0):
        again = "ask the coordinator: fedgraft provision renew; then join again"
        return FAILED, "the certificate has expired", again
    words = f"good for {left.total_seconds() / 86400:.1f} days; the agent renews it"
    return (OK if left > timedelta(days=1) else WARNING), words, ""


def _roster(state: Path) -> tuple[str, str, str]:
    digest = hash_file(state / "roster.toml")
    return OK, f"SHA-256 {digest}", "compare it with the other sites by another way"


def _audit(state: Path) -> tuple[str, str, str]:
    path = state / "audit.jsonl"
    if not path.exists():
        return OK, "no line yet", ""
    return OK, f"{verify(path)} lines, each follows from the one before", ""


def _connection(member: Membership, state: Path) -> Iterator[Finding]:
    """Name, TCP, TLS, and what the coordinator says to our certificate; each needs the last."""
    steps: list[tuple[str, Callable[[], tuple[str, str, str]]]] = [
        ("network", lambda: _network(member.endpoint)),
        ("tls", lambda: _tls(member.endpoint, state)),
        ("coordinator", lambda: _asked(member, state)),
    ]
    broken = ""
    for name, check in steps:
        if broken:
            yield Finding(name, SKIPPED, f"needs {broken}")
            continue
        finding = _tried(name, check)
        yield finding
        broken = name if finding.state == FAILED else ""


def _address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _network(endpoint: str) -> tuple[str, str, str]:
    try:
        with socket.create_connection(_address(endpoint), PATIENCE):
            return OK, f"{endpoint} answers", ""
    except socket.gaierror:
        return FAILED, f"the name of {endpoint} is not known here", "ask your network's people"
    except OSError as error:
        what = f"{endpoint} cannot be reached ({type(error).__name__})"
        return FAILED, what, "let outgoing TCP to it through; is the coordinator up?"


def _tls(endpoint: str, state: Path) -> tuple[str, str, str]:
    files = [state / name for name in ("ca.pem", "certificate.pem", "tls.key")]
    host, port = _address(endpoint)
    try:
        with (
            socket.create_connection((host, port), PATIENCE) as plain,
            make_tls(*files).wrap_socket(plain, server_hostname=host) as secured,
        ):
            return OK, f"{secured.version()} with the federation's CA", ""
    except ssl.SSLCertVerificationError as error:
        what = f"not the federation's coordinator: {error.verify_message}"
        return FAILED, what, "a proxy that opens TLS, another server, or an expired certificate"


def _asked(member: Membership, state: Path) -> tuple[str, str, str]:
    with open_member_channel(state, member.endpoint) as channel:
        stub = services.MembershipStub(channel)
        try:
            stub.GetTime(pb.TimeRequest(), timeout=PATIENCE)
            before = time.time()
            said = stub.GetTime(pb.TimeRequest(), timeout=PATIENCE).unix_seconds
            after = time.time()
        except grpc.RpcError as error:
            what = f"it refuses this site: {error.code().name.lower()}"
            return FAILED, what, "revoked or expired: ask the coordinator for a new kit"
    ahead, trip = (before + after) / 2 - said, after - before
    words = f"answers in {1000 * trip:.0f} ms; this clock is {ahead:+.1f} s off"
    if not -BEHIND <= ahead <= AHEAD:
        return FAILED, words, "set the clock: timedatectl set-ntp true"
    return OK, words, ""
