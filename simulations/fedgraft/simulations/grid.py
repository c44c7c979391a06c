"""A Flower ``Grid`` on this machine: the unmodified coordinator and client code, no network.

Replies come back in the order the messages went out, whatever worker was faster, so that sums of
floating-point numbers, and with them every byte of a run, are the same each time.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from flwr.app import DEFAULT_TTL, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.simulations.workers import Workers

__all__ = ["LocalGrid", "NodeConfig"]

NodeConfig = Mapping[str, str]
CLIENT_APP = "fedgraft.client.app:app"
SERVER = 1
WAIT = 0.02  # seconds one pull waits for a worker


@dataclass
class _Asked:
    """A message on its way: not started, then a future, then pulled and gone."""

    identifier: str
    message: Message
    future: "Future[tuple[Message, RecordDict]] | None" = None


class LocalGrid(Grid):
    """Nodes with these configurations, each running the ClientApp at ``app`` on ``workers``.

    ``app`` is ``"module:attribute"``, as in a Flower app's configuration.
    """

    def __init__(
        self, nodes: Sequence[NodeConfig], workers: Workers, *, app: str = CLIENT_APP
    ) -> None:
        self._app = app
        self._nodes = {SERVER + 1 + index: dict(config) for index, config in enumerate(nodes)}
        self._states = {node: RecordDict() for node in self._nodes}
        self._workers = workers
        self._run = Run.create_empty(1)
        self._asked: deque[_Asked] = deque()
        self._count = itertools.count()
        # Flower stamps every message with the process's task; there is only this one here.
        TaskIdentity.run_id = self._run.run_id
        TaskIdentity.node_id = SERVER
        TaskIdentity.task_id = 1

    def set_run(self, run: Run) -> None:
        """Take ``run`` as the run messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message from the coordinator to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Every node's id."""
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Every node's id, as Flower describes nodes."""
        return [NodeInfo(node_id=node) for node in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; their ids in the same order."""
        identifiers = []
        for message in messages:
            identifier = f"local-{next(self._count)}"
            message.metadata.__dict__["_message_id"] = identifier
            message.metadata.ttl = DEFAULT_TTL  # waiting for a worker here is not being late
            self._asked.append(_Asked(identifier, message))
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that are due: the oldest unanswered message's comes first.

        Works at most two messages a worker ahead, so that replies do not pile up.
        """
        replies = []
        for identifier in message_ids:
            self._start_some()
            if not self._asked or self._asked[0].identifier != identifier:
                continue
            asked = self._asked[0]
            assert asked.future is not None  # noqa: S101  # the oldest was started above
            try:
                reply, state = asked.future.result(WAIT)
            except TimeoutError:
                continue
            self._states[asked.message.metadata.dst_node_id] = state
            replies.append(reply)
            self._asked.popleft()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push ``messages`` and wait for every reply; nodes here always answer."""
        waiting = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(waiting):
            replies.extend(self.pull_messages(waiting))
        return replies

    def _start_some(self) -> None:
        ahead = 2 * max(self._workers.count, 1)
        for asked in itertools.islice(self._asked, ahead):
            if asked.future is None:
                node = asked.message.metadata.dst_node_id
                arguments = (self._app, asked.message, node, self._nodes[node], self._states[node])
                asked.future = self._workers.submit(_answer, *arguments)


@cache
def _load_app(reference: str) -> ClientApp:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def _answer(
    reference: str, message: Message, node: int, config: dict[str, str], state: RecordDict
) -> tuple[Message, RecordDict]:
    """What one node does with one message, and its state after it, which any worker may go on with.

    An exception becomes Flower's error code, as there.
    """
    context = Context(
        run_id=message.metadata.run_id,
        node_id=node,
        node_config=config,
        state=state,
        run_config={},
    )
    try:
        app = _load_app(reference)
        reply = app(Message(RecordDict(dict(message.content)), metadata=message.metadata), context)
    except Exception as error:
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        reply = Message(Error(code, type(error).__name__), reply_to=message)
    reply.metadata.__dict__["_message_id"] = f"{message.metadata.message_id}-reply"
    return reply, context.state
