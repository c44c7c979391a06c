"""A Flower grid in memory, whose nodes answer as they are told, and a clock that never waits."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.common.messages.codec import Stage, encode
from fedgraft.common.messages.payloads import (
    Payload,
    PlanReply,
    PlanRequest,
    TrainReply,
    TrainRequest,
)
from fedgraft.server.protocol.transport import Reply, Transport

__all__ = [
    "PLAN",
    "TRAIN",
    "TRAINED",
    "Answer",
    "Clock",
    "ScriptedGrid",
    "failures",
    "federation",
    "invited",
    "only_reply",
    "says",
    "silent",
    "site",
]

Answer = Callable[[Message], RecordDict | Error | None]

PLAN = PlanRequest("session", "{}", "backbone", "layout", ("w",), "fixed")
TRAIN = TrainRequest("session", 1, 0, "{}", ("w",), np.zeros(3, np.float32))
TRAINED = TrainReply("session", 1, "layout", 5, 0.5, np.ones(3, np.float32))


class ScriptedGrid(Grid):  # type: ignore[misc]  # flwr is untyped here
    """Nodes in memory: each answers a message with a record, an error or, with None, never.

    ``late[node]`` is after how many pulls of its message a node's reply is there.
    """

    def __init__(self, nodes: dict[int, Answer], late: dict[int, int] | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes, self.late = nodes, late or {}
        self.sent: list[Message] = []
        self.answered: list[int] = []
        self._waiting: dict[str, Message] = {}
        self._pulls: dict[str, int] = {}
        self._count = itertools.count()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            identifier = f"message-{next(self._count)}"
            message.metadata.__dict__["_message_id"] = identifier
            self._waiting[identifier] = message
            self.sent.append(message)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            if identifier not in self._waiting:
                continue
            message = self._waiting[identifier]
            node = message.metadata.dst_node_id
            self._pulls[identifier] = self._pulls.get(identifier, 0) + 1
            if self._pulls[identifier] <= self.late.get(node, 0):
                continue
            content = self.nodes[node](message)
            if content is not None:
                del self._waiting[identifier]
                self.answered.append(node)
                replies.append(Message(content, reply_to=message))
        return replies

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def says(payload: Payload) -> Answer:
    """A node that answers everything with ``payload``."""
    return lambda message: encode(payload)


def site(name: str, reply: Answer = says(TRAINED)) -> Answer:  # noqa: B008
    """A node that takes part under ``name`` and answers everything else with ``reply``."""

    def answer(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == Stage.PLAN:
            return encode(PlanReply("session", name))
        return reply(message)

    return answer


def silent(message: Message) -> None:
    """A node that never answers."""
    return None


def federation(
    sites: dict[str, Answer], late: dict[int, int] | None = None
) -> tuple[Transport, ScriptedGrid, Clock]:
    """A transport that has invited these sites; they are nodes 11, 12, ... in this order."""
    nodes = {11 + index: site(name, sites[name]) for index, name in enumerate(sites)}
    grid, clock = ScriptedGrid(nodes), Clock()
    transport = Transport(grid, clock=clock, pause=clock.pause)
    replies = list(transport.invite(PLAN, 60.0))
    assert all(isinstance(reply.payload, PlanReply) for reply in replies)
    grid.late = late or {}
    grid.sent.clear()
    grid.answered.clear()
    clock.pauses.clear()
    return transport, grid, clock


def only_reply(answer: Answer) -> Reply:
    transport, _, _ = federation({"a": answer})
    (reply,) = transport.ask(["a"], Stage.TRAIN, TRAIN, 10.0)
    return reply


def invited(nodes: dict[int, Answer]) -> tuple[Transport, list[Reply], ScriptedGrid]:
    clock = Clock()
    grid = ScriptedGrid(nodes)
    transport = Transport(grid, clock=clock, pause=clock.pause)
    return transport, list(transport.invite(PLAN, 5.0)), grid


def failures(replies: Sequence[Reply]) -> list[tuple[str, str]]:
    return [(reply.site, reply.failure) for reply in replies]
