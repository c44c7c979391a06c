"""Flower's processes at the coordinator, and the client that controls them.

The SuperLink listens only on loopback, with TLS because node authentication needs it. Its executor
authenticates with a secret. The Control API starts runs and registers nodes without authentication:
every process that may connect to loopback on this host is trusted. tests/e2e/test_contract.py
compares the internals of Flower that are used here with the real ones.
"""

import ssl
import sysconfig
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import pull_objects, push_objects
from flwr.superlink.grid import http_grid

from fedgraft.common.errors import FedgraftError
from fedgraft.common.messages.flower_objects import known_objects, unasked_objects

__all__ = ["FINISHED", "Control", "executor_command", "save_requests", "superlink_command"]

FINISHED = "finished"
HOST = "127.0.0.1"
APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedgraft"
version = "0.1.0"
description = "Entry points of fedgraft; the code is what each party installed."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedgraft"

[tool.flwr.app.components]
serverapp = "fedgraft.server.app:app"
clientapp = "fedgraft.client.app:app"

[tool.flwr.app.config]
job = ""
run = ""
federation = ""
sealed = ""
"""


def superlink_command(
    port: int, *, certificate: Path, key: Path, ca: Path, secret: Path
) -> list[str]:
    """Return the command of a SuperLink that keeps its state in memory.

    Memory is enough, because our checkpoints outlive the SuperLink.
    """
    return [
        _script("flower-superlink"),
        *("--host", HOST, "--port", str(port), "--isolation", "process"),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
        *("--ssl-ca-certfile", str(ca), "--enable-supernode-auth"),
        *("--superexec-auth-secret-file", str(secret)),
        "--disable-runtime-dependency-installation",
    ]


def executor_command(port: int, *, ca: Path, secret: Path) -> list[str]:
    """Return the command of the executor, which starts the ServerApp of each run."""
    return [
        _script("flower-superexec"),
        *("--runtime-api-address", f"{HOST}:{port}", "--root-certificates", str(ca)),
        *("--superexec-auth-secret-file", str(secret)),
    ]


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def save_requests(grid: Grid, *, to_agents: bool) -> None:
    """Make a grid over HTTP request and send only the objects it must, and wait only shortly.

    A site sends a message, then its objects. Flower waits a second before it asks again for an
    object that is not there yet. Over all stages of a round these waits add up to more than all
    other time. With ``to_agents``, the sites run our agents: objects that are known in advance are
    neither sent to them nor requested. Flower's own nodes send all objects.
    """
    if not isinstance(grid, http_grid.HttpGrid):
        return  # the grid of a simulation
    client = grid._runtime_client
    pull_messages = client.PullMessages
    offers: dict[str, ProtoMessage] = {}  # by id, the messages that are being pulled

    def pull_noted(request: Any) -> Any:
        reply = pull_messages(request)
        offers.clear()
        offers.update({offer.metadata.message_id: offer for offer in reply.messages_list})
        return reply

    def pull_unknown(
        object_ids: list[str], pull_object_fn: Callable[[str], bytes]
    ) -> dict[str, bytes]:
        found = known_objects(object_ids, offers.get(object_ids[-1])) if to_agents else {}
        unknown = [each for each in object_ids if each not in found]
        found.update(pull_objects(unknown, pull_object_fn, initial_backoff=0.01, backoff_cap=0.5))
        return found

    client.PullMessages = pull_noted
    http_grid.pull_objects = pull_unknown
    if to_agents:
        http_grid.push_objects = _push_objects


def _push_objects(
    objects: dict[str, InflatableObject],
    push_object_fn: Callable[[str, bytes], None],
    *,
    object_ids_to_push: set[str],
) -> None:
    messages = [each for each in objects.values() if isinstance(each, Message)]
    unasked = {part for one in messages for part in unasked_objects(one)}
    push_objects(objects, push_object_fn, object_ids_to_push=object_ids_to_push - unasked)


class Control:
    """The coordinator's client for its SuperLink, over the Control API on loopback."""

    def __init__(self, port: int, ca: Path) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        self._client = ControlHttpClient(f"https://{HOST}:{port}", verify=context)

    def start(self, config: Mapping[str, str]) -> int:
        """Start a run of the installed ``fedgraft.server.app`` with ``config``; return its id.

        Raises:
            FedgraftError: the SuperLink did not start the run.
        """
        content, _ = build_fab_from_files({"pyproject.toml": APP.encode()})
        reply = self._ask(
            self._client.StartRun,
            StartRunRequest(
                fab=Fab(content=content), override_config=user_config_to_proto(dict(config))
            ),
        )
        if not reply.HasField("run_id"):
            raise FedgraftError("the SuperLink did not start the run", hint="look at its log")
        return int(reply.run_id)

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        self._ask(self._client.StopRun, StopRunRequest(run_id=run_id))

    def status(self, run_id: int) -> str:
        """Return the status of a run, such as ``pending``, ``running`` or ``finished``."""
        reply = self._ask(self._client.ListRuns, ListRunsRequest(run_id=run_id))
        return str(reply.run_dict[run_id].status.status)

    def register(self, public_key: bytes, name: str) -> int:
        """Register the node with this public key (PEM); return its id."""
        request = RegisterNodeRequest(public_key=public_key, name=name)
        return int(self._ask(self._client.RegisterNode, request).node_id)

    def unregister(self, node_id: int) -> None:
        """Unregister a node, so that it can no longer take part."""
        self._ask(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> dict[int, dict[str, Any]]:
        """Return the registered nodes by id: ``status``, ``activated`` and ``last_seen``.

        ``activated`` and ``last_seen`` are Unix seconds, or None for a node without a session so
        far.
        """
        reply = self._ask(self._client.ListNodes, ListNodesRequest())
        return {int(node.node_id): _read_node(node) for node in reply.nodes_info}

    def close(self) -> None:
        """Close the connection."""
        self._client._client.close()

    def _ask(self, call: Any, request: Any) -> Any:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise FedgraftError(f"the SuperLink answers {status}", hint="look at its log") from None
        except httpx.TransportError as error:
            what = f"the SuperLink does not answer ({type(error).__name__})"
            raise FedgraftError(what, hint="it is started again") from None


def _read_node(node: Any) -> dict[str, Any]:
    """Return Flower's facts about a node.

    Flower keeps the time until which a node counts as online. It is ``HEARTBEAT_PATIENCE``
    intervals after the last heartbeat, or the time at which the node ended its session. The two
    cases look the same, so for a node that ended its session ``last_seen`` is up to a minute early.
    """
    activated = last_seen = None
    if node.HasField("last_activated_at"):
        activated = datetime.fromisoformat(node.last_activated_at).timestamp()
        heard = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
        last_seen = max(activated, heard)
    return {"status": str(node.status), "activated": activated, "last_seen": last_seen}
