"""What our code relies on of Flower's insides, held to the real processes of this Flower.

No nginx, no coordinator: a SuperLink and its executor, started as the coordinator starts them, and
sites that speak to them as the agent does. A Flower that changes fails here first, and says which
of our files to mend.
"""

import base64
import logging
import os
import ssl
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from e2e.superlink import PATIENCE, QUIET, _listens, die_with_parent, free_ports
from flwr.common.constant import (
    FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE,
    HEARTBEAT_DEFAULT_INTERVAL,
    HEARTBEAT_PATIENCE,
    ErrorCode,
)
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.superlink.grid import http_grid
from support.clinic import Authority
from support.federations import digits_job, write_digits

from fedgraft.client.agent import superlink_session as fleet
from fedgraft.client.agent.process import Agent, PollInterval, make_tls
from fedgraft.client.agent.superlink_session import SessionAlive, SessionUnknown, SuperLinkSession
from fedgraft.client.membership.identity import make_identity
from fedgraft.common.config.jobfile import dump_job
from fedgraft.common.errors import FedgraftError
from fedgraft.common.federation.certificates import make_key, public_pem
from fedgraft.common.federation.federation_file import Federation, dump_federation
from fedgraft.common.files import write_private
from fedgraft.common.messages.codec import SMALL
from fedgraft.common.messages.flower_objects import known_objects
from fedgraft.server.coordinator.nginx import BODY, NginxConfig, write_nginx_config
from fedgraft.server.coordinator.superlink import (
    FINISHED,
    Control,
    executor_command,
    save_requests,
    superlink_command,
)
from fedgraft.server.protocol.transport import FLOWER_ERRORS
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare

FLEET, SUPERLINK = (
    "client/fedgraft/client/agent/superlink_session.py",
    "server/fedgraft/server/coordinator/superlink.py",
)
AGENT, TRANSPORT = (
    "client/fedgraft/client/agent/process.py",
    "server/fedgraft/server/protocol/transport.py",
)
OBJECTS = "common/fedgraft/common/messages/flower_objects.py"
COORDINATOR = "server/fedgraft/server/coordinator/process.py"
FRONT = "server/fedgraft/server/coordinator/nginx.py"
PROTOBUF = {"content-type": "application/protobuf"}
SECRET = "what a site's exception says"
FLEET_PATHS = {
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "register-node",
    "send-node-heartbeat",
    "unregister-node",
}


@contextmanager
def relied_on_by(*files: str) -> Iterator[None]:
    """Whatever fails inside names the files that rely on it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"This Flower is not as we took it to be: mend {' and '.join(files)} alone.")
        raise


@dataclass(frozen=True)
class Link:
    """A SuperLink with its executor."""

    folder: Path
    port: int
    control: Control

    @property
    def endpoint(self) -> str:
        return f"localhost:{self.port}"

    def tls(self) -> ssl.SSLContext:
        return make_tls(*(self.folder / name for name in ("ca.pem", "server.pem", "server.key")))

    def client(self) -> httpx.Client:
        return httpx.Client(verify=self.tls(), base_url=f"https://{self.endpoint}")

    def fleet(self, key: EllipticCurvePrivateKey) -> SuperLinkSession:
        return SuperLinkSession(self.endpoint, self.tls(), key)

    def until(self, happened: Callable[[], object], limit: float = PATIENCE) -> None:
        stop = time.monotonic() + limit
        while not happened():
            assert time.monotonic() < stop, f"waited {limit:g} s in vain"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    folder, (port,) = tmp_path_factory.mktemp("link"), free_ports(1)
    authority = Authority()
    key, certificate = authority.server()
    contents = {"ca.pem": authority.pem, "server.pem": certificate, "server.key": key}
    for name, content in {**contents, "secret": os.urandom(32)}.items():
        write_private(folder / name, content)
    tls = {"ca": folder / "ca.pem", "secret": folder / "secret"}
    server = {"certificate": folder / "server.pem", "key": folder / "server.key"}
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(folder / "flower"), "PATH": path}
    commands = [superlink_command(port, **tls, **server), executor_command(port, **tls)]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "flower.log").open("wb"))
        for command in commands:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        link = Link(folder, port, Control(port, folder / "ca.pem"))
        with relied_on_by(SUPERLINK):
            link.until(lambda: _listens(port))
        yield link
        link.control.close()


# --- the SuperLink, as server/coordinator/superlink.py asks it


@pytest.mark.slow
def test_nodes_are_registered_seen_and_forgotten(link: Link) -> None:
    key = make_key()
    with relied_on_by(SUPERLINK):
        node = link.control.register(public_pem(key.public_key()), "a")
        assert link.control.nodes()[node]["status"] == "registered"
        with link.fleet(key) as session:
            assert session.node_id == node
            assert link.control.nodes()[node]["status"] == "online"
        assert link.control.nodes()[node]["status"] == "offline"
        link.control.unregister(node)
        assert link.control.nodes().get(node, {}).get("status") in (None, "unregistered")
    with relied_on_by(COORDINATOR), pytest.raises(FedgraftError):  # who comes back needs a new one
        link.control.register(public_pem(key.public_key()), "a")


def test_a_run_that_is_not_there_is_an_error_without_its_text(link: Link) -> None:
    with (
        relied_on_by(SUPERLINK),
        pytest.raises(FedgraftError, match=r"^the SuperLink answers 404$"),
    ):
        link.control.stop(1)


def test_tasks_are_for_who_has_the_secret(link: Link) -> None:
    """The public port hides this path; it must not be open to all of this host either."""
    with relied_on_by(SUPERLINK), link.client() as client:
        answer = client.post("/v1/runtime/acquire-task", content=b"", headers=PROTOBUF)
        assert answer.status_code == 401


def test_how_the_grid_pulls_and_pushes_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with relied_on_by(SUPERLINK, OBJECTS):
        theirs, pushes = http_grid.pull_objects, http_grid.push_objects
        monkeypatch.setattr(http_grid, "pull_objects", theirs)  # to be put back
        monkeypatch.setattr(http_grid, "push_objects", pushes)
        client = SimpleNamespace(PullMessages=lambda request: PullAppMessagesResponse())
        grid = http_grid.HttpGrid(token="secret")
        monkeypatch.setattr(grid, "_client", client)
        save_requests(grid, to_agents=True)
        assert client.PullMessages(None) == PullAppMessagesResponse()
        assert http_grid.pull_objects is not theirs
        assert http_grid.push_objects is not pushes
        assert "push_objects" in http_grid.HttpGrid._try_push_messages.__code__.co_names
        used = http_grid.HttpGrid.pull_messages.__code__.co_names
        assert {"pull_objects", "_runtime_client", "PullMessages"} <= set(used)
        wanted = {"object_ids": ["a", "b"], "pull_object_fn": str.encode}
        assert http_grid.pull_objects(**wanted) == theirs(**wanted) == {"a": b"a", "b": b"b"}


# --- the Fleet API, as client/agent/superlink_session.py speaks it


def test_a_key_has_one_session_and_none_if_it_is_not_registered(link: Link) -> None:
    key = make_key()
    with relied_on_by(FLEET):
        with pytest.raises(SessionAlive), link.fleet(key):
            pass
        node = link.control.register(public_pem(key.public_key()), "b")
        with link.fleet(key) as session:
            with pytest.raises(SessionAlive), link.fleet(key):
                pass
            assert session.receive() is None
            link.control.unregister(node)
            with pytest.raises(SessionUnknown):
                session.receive()


def test_a_session_that_died_is_given_up_within_a_minute(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's log promises a killed site to be back within 90 s."""
    with relied_on_by(FLEET, AGENT):
        assert HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL <= 60
        assert fleet.BEAT < HEARTBEAT_DEFAULT_INTERVAL
    monkeypatch.setattr(fleet, "BEAT", 0.05)
    key = make_key()
    with relied_on_by(FLEET):
        node = link.control.register(public_pem(key.public_key()), "c")
        with link.fleet(key) as session:
            time.sleep(0.3)
            assert session.receive() is None  # beats were taken
            link.control.unregister(node)
            link.until(lambda: isinstance(session._lost, SessionUnknown))


def test_the_front_knows_the_paths_the_header_and_the_size(link: Link, tmp_path: Path) -> None:
    """All of /v1/fleet/ but two paths is passed on: what is new there must be looked at first."""
    key = make_key()
    headers: list[httpx.Headers] = []
    with relied_on_by(FRONT):
        with link.client() as client:
            paths = client.get("/openapi.json").json()["paths"]
        prefix = "/v1/fleet/"
        assert {path.removeprefix(prefix) for path in paths if prefix in path} == FLEET_PATHS
        session = link.fleet(key)
        session._client._client.event_hooks["request"] = [lambda one: headers.append(one.headers)]
        with pytest.raises(SessionAlive), session:
            pass
        public = base64.b64encode(public_pem(key.public_key())).decode()
        write_nginx_config(NginxConfig(tmp_path, "127.0.0.1:1", 1, {"d": public}))
        written = (tmp_path / "nginx" / "nginx.conf").read_text()
        assert f'"CN=d {headers[0]["flwr-public-key"]}" d;' in written
        assert 'map "$ssl_client_s_dn $http_flwr_public_key" $node_of' in written
        assert int(BODY.removesuffix("m")) * 2**20 / 2 > FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


# --- messages, there and back


def test_flowers_error_codes_mean_what_we_say() -> None:
    with relied_on_by(TRANSPORT):
        assert FLOWER_ERRORS == {
            ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "app-failed",
            ErrorCode.MESSAGE_UNAVAILABLE: "expired",
            ErrorCode.NODE_UNAVAILABLE: "site-unreachable",
            ErrorCode.CLIENT_APP_CRASHED: "app-died",
        }


@pytest.mark.slow
def test_a_job_is_done_by_the_installed_code_until_it_is_stopped(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A round over the executor's ServerApp: arrays both ways, a seal on the request's id.

    Then a message fails at the site, of which an error arrives without its text; and the run is
    stopped while the site is at work, which does not end its session.
    """
    options = ("simulation.sites=2", "rounds.count=2", "rounds.min_sites=1", "method.rank=64")
    job = digits_job(*write_digits(tmp_path / "digits", 40, 10), *options, "rounds.deadline='60s'")
    site = prepare(job).folder / "site-00" / "site.toml"
    identity, key = make_identity(tmp_path / "state"), make_key()
    members = Federation(sites={"site-00": identity.public.hex()})
    (tmp_path / "roster.toml").write_text(dump_federation(members))
    signed: list[bytes] = []

    def sign(content: bytes) -> bytes:
        signed.append(content)
        if len(signed) == 3:  # after PLAN and TRAIN
            raise ZeroDivisionError(SECRET)
        if len(signed) == 4:
            link.control.stop(run)
        return identity.sign(content)

    known: list[int] = []

    def know(*asked: Any) -> dict[str, bytes]:
        found = known_objects(*asked)
        known.append(len(found))
        return found

    monkeypatch.setattr(fleet, "known_objects", know)
    caplog.set_level(logging.INFO, "fedgraft.client")

    agent = Agent(
        site="site-00",
        endpoint=link.endpoint,
        key=key,
        sign=sign,
        node_config={"site": str(site), "state": str(tmp_path / "state"), "device": "cpu"},
        tls=link.tls,
        poll_interval=PollInterval(idle=0.1),
    )
    config = {"job": dump_job(job), "run": str(tmp_path / "run"), "sealed": "yes"}
    with relied_on_by(SUPERLINK, FLEET, OBJECTS, AGENT, TRANSPORT):
        node = link.control.register(public_pem(key.public_key()), "site-00")
        run = link.control.start({**config, "federation": str(tmp_path / "roster.toml")})
        assert link.control.status(run) in ("pending", "starting", "running")
        working = threading.Thread(target=agent.run, daemon=True)
        working.start()
        try:
            link.until(lambda: link.control.status(run) == FINISHED)
            link.until(lambda: "its run was stopped" in caplog.text)
        finally:
            agent.stopping = True
            working.join(30)
        assert caplog.text.count("joined as") == 1
        assert known[0] == 2  # of three: PLAN's payload alone was asked for
        (line,) = Run(tmp_path / "run").history()
        assert line["sites"] == 1
        assert line["bytes_up"] > SMALL  # an array of its own, as it came
        assert line["dropped"] == [{"site": "site-00", "reason": "evaluation: app-failed"}]
        link.control.unregister(node)
    assert SECRET not in (link.folder / "flower.log").read_text(errors="replace")
