"""A SuperLink's Fleet API in memory: what a site says to it goes through httpx, and no further.

link.install(monkeypatch)
with SuperLinkSession("link:1", None, key) as fleet:
    link.send(content, "train")
    task = fleet.receive()
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedgraft.common.messages.flower_objects import known_objects

__all__ = ["NODE", "RUN", "FakeSuperLink"]

NODE, RUN = 77, 1234567
REQUESTS = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "push-object": message_pb2.PushObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
}


class FakeSuperLink:
    """One node's view; ``broken`` maps a call's name to what is answered, or raised, instead."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: list[httpx.Headers] = []
        self.broken: dict[str, httpx.Response | Exception] = {}
        self.unavailable = 0  # times that an object is not there yet
        self.lost = False  # objects are not found
        self.alive = True  # what a heartbeat is answered
        self.stores = True  # whether objects are taken
        self.confirmed: list[str] = []
        self._waiting: list[Message] = []
        self._objects: dict[str, bytes] = {}
        self._pushed: list[tuple[Any, Any]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have every HTTP client of Flower's ask this."""
        client = httpx.Client

        def make(**kept: Any) -> httpx.Client:
            kept.pop("verify")
            return client(transport=httpx.MockTransport(self._answer), **kept)

        monkeypatch.setattr("flwr.supercore.protobuf.client.httpx.Client", make)

    def send(self, content: RecordDict, kind: str) -> Message:
        """Have a message wait for the node."""
        known = (RUN, "", 1, NODE, "", "", time.time(), 3600.0, kind)
        message = make_message(Metadata(*known), content=content)
        message.metadata.__dict__["_message_id"] = message.object_id
        self._waiting.append(message)
        return message

    @property
    def replies(self) -> list[Message]:
        """The replies of which every part has come that the coordinator does not make itself."""
        found = []
        for proto, tree in self._pushed:
            names = [one.object_id for one in iterate_object_tree(tree)]
            parts = self._objects | known_objects(names, proto)
            if all(name in parts for name in names):
                whole = inflate_object_from_contents(tree.object_id, parts)
                content = whole.content if whole.has_content() else None
                error = whole.error if whole.has_error() else None
                metadata = message_from_proto(proto).metadata
                found.append(make_message(metadata, content=content, error=error))
        return found

    def _answer(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.removeprefix("/v1/fleet/")
        self.asked[name] += 1
        self.headers.append(request.headers)
        if instead := self.broken.get(name):
            if isinstance(instead, Exception):
                raise instead
            return instead
        method: Callable[[Any], Any] = getattr(self, "_" + name.replace("-", "_"))
        message = REQUESTS[name]()
        message.ParseFromString(request.content)
        return httpx.Response(200, content=method(message).SerializeToString())

    def _activate_node(self, request: Any) -> Any:
        return fleet_pb2.ActivateNodeResponse(node_id=NODE)

    def _deactivate_node(self, request: Any) -> Any:
        return fleet_pb2.DeactivateNodeResponse()

    def _send_node_heartbeat(self, request: Any) -> Any:
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=self.alive)

    def _pull_messages(self, request: Any) -> Any:
        assert request.node.node_id == NODE
        if not self._waiting:
            return fleet_pb2.PullMessagesResponse()
        message = self._waiting.pop(0)
        for name, part in get_all_nested_objects(message).items():
            self._objects[name] = part.deflate()
        return fleet_pb2.PullMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
        )

    def _pull_object(self, request: Any) -> Any:
        if self.lost:
            return message_pb2.PullObjectResponse(object_found=False)
        if self.unavailable:
            self.unavailable -= 1
            return message_pb2.PullObjectResponse(object_found=True, object_available=False)
        content = self._objects[request.object_id]
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )

    def _confirm_message_received(self, request: Any) -> Any:
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()

    def _push_messages(self, request: Any) -> Any:
        self._pushed.append((request.messages_list[0], request.message_object_trees[0]))
        names = [one.object_id for one in iterate_object_tree(request.message_object_trees[0])]
        return fleet_pb2.PushMessagesResponse(objects_to_push=names, session_id="s")

    def _push_object(self, request: Any) -> Any:
        assert request.session_id == "s"
        if self.stores:
            self._objects[request.object_id] = request.object_content
        return message_pb2.PushObjectResponse(stored=self.stores)
