"""The coordinator's own state and its nginx, without Flower's processes."""

import json
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.node_pb2 import NodeInfo
from support.commands import command
from support.memberships import NAMES, open_federation
from support.memberships import Coordinator as Federation
from support.programs import find
from support.standings import make_status

from fedgraft.client.agent.process import make_tls
from fedgraft.common.federation.certificates import load_key, make_crl, serial
from fedgraft.server.coordinator import nginx_refusals as refusals
from fedgraft.server.coordinator.grpc_services import OperatorService, serve_operators
from fedgraft.server.coordinator.process import Coordinator
from fedgraft.server.coordinator.superlink import _read_node
from fedgraft.server.enrollment.provision import revoke
from fedgraft.server.enrollment.registry import Registry
from fedgraft.server.paths import Home

A, B, C = NAMES


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with open_federation(tmp_path_factory.mktemp("c")) as running:  # short: it holds sockets
        running.join(A)
        yield running


class Watched:
    """A coordinator with nginx alone, and what it told."""

    def __init__(self, home: Path, nginx: str) -> None:
        self.events: list[dict[str, Any]] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        self.coordinator = Coordinator(
            Home(home), listen=self.endpoint, event=self._event, nginx=nginx
        )
        processes = self.coordinator.processes
        for name in ("superlink", "executor"):  # Flower's
            processes[name].tend = lambda: False  # type: ignore[method-assign]
        front = processes["front"]
        self.signals: list[str] = []
        send = front.signal

        def signal(number: Any) -> None:
            self.signals.append(number.name)
            send(number)

        front.signal = signal  # type: ignore[method-assign]

    def _event(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def until(self, happened: Callable[[], object], limit: float = 20) -> None:
        stop = time.monotonic() + limit
        while not happened():
            assert time.monotonic() < stop
            self.coordinator.tend()
            time.sleep(0.05)


def site_of(coordinator: Coordinator, name: str) -> dict[str, Any]:
    return next(site for site in coordinator.status()["sites"] if site["site"] == name)


# --- without any process


def test_a_status_is_json_and_names_every_site(federation: Federation) -> None:
    revoke(federation.home, C)
    watched = Watched(federation.home, "/bin/false")
    status = watched.coordinator.status()
    assert json.loads(json.dumps(status)) == status
    assert make_status().keys() == status.keys()
    assert make_status()["sites"][0].keys() == status["sites"][0].keys()
    assert {site["site"]: site["state"] for site in status["sites"]} == {
        A: "joined",
        B: "invited",
        C: "revoked",
    }
    assert status["totals"]["restarts"] == {"superlink": 0, "executor": 0, "front": 0}


def test_last_seen_outlives_the_superlink_that_saw_it(federation: Federation) -> None:
    coordinator = Watched(federation.home, "/bin/false").coordinator
    found = {7: {"status": "online", "activated": 900.0, "last_seen": 1000.0}}
    coordinator._control = Answers(found)  # type: ignore[assignment]
    coordinator.nodes = {A: 7, B: 8}
    coordinator._look_at_nodes()
    assert site_of(coordinator, A) | {"audit": 0} == {
        "site": A, "state": "joined", "connected": True, "last_seen": 1000.0, "audit": 0,
    }  # fmt: skip
    assert site_of(coordinator, B)["last_seen"] is None
    coordinator._started("superlink")
    assert (site_of(coordinator, A)["connected"], site_of(coordinator, A)["last_seen"]) == (
        False,
        1000.0,
    )
    coordinator._control = Answers({7: {"status": "offline", "activated": None, "last_seen": None}})  # type: ignore[assignment]
    coordinator.nodes, coordinator._next_poll = {A: 7}, 0.0
    coordinator._look_at_nodes()
    assert site_of(coordinator, A)["last_seen"] == 1000.0
    revoke(federation.home, A)
    coordinator._seen[A] = found[7]
    assert not site_of(coordinator, A)["connected"]


def test_when_flower_last_heard_of_a_node() -> None:
    now, interval = 1_800_000_000.0, 30.0
    node = NodeInfo(status="registered", heartbeat_interval=interval)
    assert _read_node(node) == {"status": "registered", "activated": None, "last_seen": None}
    node.last_activated_at = "2027-01-15T07:50:00+00:00"
    node.online_until = now - 5 + HEARTBEAT_PATIENCE * interval
    assert _read_node(node)["last_seen"] == now - 5
    assert _read_node(node)["activated"] == now - 600
    node.online_until = now - 599  # a goodbye after a second
    assert _read_node(node)["last_seen"] == now - 600


class Answers:
    def __init__(self, nodes: dict[int, dict[str, Any]]) -> None:
        self._nodes = nodes

    def nodes(self) -> dict[int, dict[str, Any]]:
        return self._nodes

    def close(self) -> None:
        pass


def test_the_head_of_an_audit_is_in_the_status(federation: Federation) -> None:
    with Registry(federation.home).change() as sites:
        told = {"audit_lines": 31, "audit_head": "ab" * 32, "audit_run": "r1", "audit_round": 2}
        sites[A] = replace(sites[A], **told, audit_time="2027-01-15T08:00:00+00:00")  # type: ignore[arg-type]
    coordinator = Watched(federation.home, "/bin/false").coordinator
    assert site_of(coordinator, A)["audit"] == {
        "lines": 31, "head": "ab" * 32, "run": "r1", "round": 2, "time": 1_800_000_000.0, "lost": 0,
    }  # fmt: skip
    assert site_of(coordinator, B)["audit"]["time"] is None


def test_nginx_reads_a_new_revocation_list_also_when_the_members_are_the_same(
    federation: Federation,
) -> None:
    watched = Watched(federation.home, "/bin/false")
    watched.coordinator._follow_registry()
    watched.signals.clear()
    watched.coordinator._follow_registry()
    assert watched.signals == []
    for name in ("crl.pem", "server.pem"):
        copy = shutil.copy(federation.home / name, federation.home / "new")
        Path(copy).replace(federation.home / name)
        watched.coordinator._follow_registry()
        watched.coordinator._follow_registry()
        assert watched.signals == ["SIGHUP"]
        watched.signals.clear()


# --- with nginx


@pytest.fixture
def watched(federation: Federation) -> Iterator[Watched]:
    made = Watched(federation.home, find("nginx", source="Debian's package nginx-light"))
    try:
        made.until(lambda: (federation.home / "nginx" / "nginx.pid").exists())
        yield made
    finally:
        made.coordinator.close()


def post(
    watched: Watched, path: str, tls: ssl.SSLContext, content: bytes = b"", **more: Any
) -> int:
    with httpx.Client(verify=tls, **more) as client:
        return client.post(f"https://{watched.endpoint}{path}", content=content).status_code


def tls_of(federation: Federation, name: str | None) -> ssl.SSLContext:
    ca = federation.home / "ca.pem"
    if name is None:
        return ssl.create_default_context(cafile=str(ca))
    return make_tls(
        ca, federation.state(name) / "certificate.pem", federation.state(name) / "tls.key"
    )


def test_what_nginx_refuses_is_told_with_code_site_and_path(
    federation: Federation, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "WINDOW", 0.0)
    stranger, member = tls_of(federation, None), tls_of(federation, A)
    asked = [
        ("/docs", stranger, "", "NONE", 404),
        ("/v1/fleet/pull-messages", stranger, "", "NONE", 401),
        ("/v1/fleet/register-node", member, A, "SUCCESS", 403),
        ("/v1/fleet/pull-messages", member, A, "SUCCESS", 403),  # without its node key
        ("/v1/control/start-run", member, A, "SUCCESS", 404),
        ("/%FF%1b%22", member, A, "SUCCESS", 404),
    ]
    for path, tls, *_, status in asked:
        assert post(watched, path, tls) == status
    assert post(watched, "/x", member, bytes(17_000_000)) in (404, 413)
    watched.until(lambda: sum(watched.coordinator.status()["totals"]["refused"].values()) == 7)
    told = [event for event in watched.events if event["event"] == "refused"]
    found = {(e["path"], e["site"], e["certificate"], e["status"]) for e in told}
    for path, _, site, verify, status in asked[:-1]:
        assert (path, site, verify, status) in found
    assert ('/??"', A, "SUCCESS", 404) in found


def test_a_certificate_in_a_new_revocation_list_is_refused_at_once(
    federation: Federation, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The members are the same: only the list says so."""
    monkeypatch.setattr(refusals, "WINDOW", 0.0)
    tls = tls_of(federation, A)
    assert post(watched, "/docs", tls) == 404
    dead = serial((federation.state(A) / "certificate.pem").read_bytes())
    key = load_key((federation.home / "ca.key").read_bytes())
    ca = (federation.home / "ca.pem").read_bytes()
    new = federation.home / "new.pem"
    new.write_bytes(make_crl(ca, key, {dead}, datetime.now(UTC)))
    new.replace(federation.home / "crl.pem")
    watched.until(lambda: post(watched, "/docs", tls) == 400)
    watched.until(lambda: watched.coordinator.status()["totals"]["refused"].get("400"))
    (event, *_) = [e for e in watched.events if e.get("status") == 400]
    assert (event["site"], event["certificate"]) == (A, "FAILED:certificate revoked")


def test_the_log_is_moved_while_nginx_writes(
    federation: Federation, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "LARGE", 2000)
    with httpx.Client(verify=tls_of(federation, None)) as client:
        for _ in range(60):
            assert client.post(f"https://{watched.endpoint}/x").status_code == 404
            watched.coordinator.tend()
    watched.until(lambda: watched.coordinator.status()["totals"]["refused"].get("404") == 60)
    assert watched.signals.count("SIGUSR1") >= 2
    assert (federation.home / "nginx" / "refused.before.log").stat().st_size < 10_000


# --- what the terminal shows


def test_the_status_command(
    federation: Federation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    facts = make_status()
    (federation.home / "run").mkdir(exist_ok=True)
    server = serve_operators(federation.home, OperatorService(str, lambda: facts, print))
    try:
        where = ("coordinator", "status", "--home", str(federation.home))
        code, out, _ = command(capsys, *where)
        assert code == 0
        for words in ("hospital-a", "12 s ago", "4 of 10", "somebody as hospital-d", "ALARM"):
            assert words in out
        facts["processes"]["front"]["pid"] = 0
        code, out, _ = command(capsys, *where, "--json")
        assert code == 1
        assert json.loads(out) == facts
    finally:
        server.stop(0)


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("127.0.0.1:99999", "no ADDRESS:PORT"),
        ("here", "no ADDRESS:PORT"),
        ("192.0.2.1:8443", "annot assign requested address"),
    ],
)
def test_a_port_that_cannot_be_opened_starts_nothing(
    federation: Federation, capsys: pytest.CaptureFixture[str], listen: str, words: str
) -> None:
    where = ("--home", str(federation.home), "--listen", listen, "--watch", "")
    code, _, err = command(capsys, "coordinator", "run", *where)
    assert code == 2
    assert words in err
    assert "--listen" in err
    assert not (federation.home / "nginx").exists()


@pytest.mark.parametrize(
    ("watch", "words"),
    [
        ("0.0.0.0:9464", "open to others"),
        ("127.0.0.1:x", "no ADDRESS:PORT"),
        ("taken", "can listen on"),
    ],
)
def test_a_page_that_cannot_be_served_starts_nothing(
    federation: Federation, capsys: pytest.CaptureFixture[str], watch: str, words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        if watch == "taken":
            watch = f"127.0.0.1:{other.getsockname()[1]}"
        where = ("--home", str(federation.home), "--watch", watch)
        code, _, err = command(capsys, "coordinator", "run", *where)
    assert code == 2
    assert words in err
    assert "--watch" in err
    assert not list((federation.home / "logs").iterdir())
    assert not (federation.home / "nginx").exists()
