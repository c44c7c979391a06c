"""A Flower ``Grid`` on this machine: unmodified code of coordinator and sites, without a network.

Replies come back in the order in which the messages were sent, even if another worker was faster.
Therefore sums of floating-point numbers, and every byte of a run, are the same each time. Messages
that ask to train are answered in groups of a fixed size: the sites of a group share one pass over
the backbone.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field

from flwr.app import DEFAULT_TTL, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.client.app import app, train_all
from fedgraft.simulations.grid.workers import Workers

__all__ = ["Answer", "LocalGrid", "NodeConfig", "answer_as_installed"]

NodeConfig = Mapping[str, str]
Answer = Callable[[Sequence[tuple[Message, Context]]], list[Message]]
TRAIN = "train"  # Flower's message type
SERVER = 1
WAIT = 0.02  # seconds that one pull waits for a worker


@dataclass
class _Group:
    """Messages that are answered together.

    A group has no ``future`` before it is started. Its replies are pulled one by one.
    """

    waiting: deque[tuple[str, Message]] = field(default_factory=deque)
    future: "Future[list[_Replied]] | None" = None


_Replied = tuple[Message, RecordDict]  # a reply, and the node's state after it


def answer_as_installed(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Answer one message, or several that ask to train, with the installed code of a site."""
    return train_all(asked) if len(asked) > 1 else [app(*asked[0])]


class LocalGrid(Grid):
    """A grid of nodes with these configurations; ``answer`` answers their messages on ``workers``.

    ``answer`` must be a function of a module, because it is sent to other processes by its name.
    It gets one message with its node's context, or up to ``together`` messages that ask to train.
    """

    def __init__(
        self,
        nodes: Sequence[NodeConfig],
        workers: Workers,
        *,
        answer: Answer = answer_as_installed,
        together: int = 1,
    ) -> None:
        self._answer, self._together = answer, together
        self._nodes = nodes
        self._states: dict[int, RecordDict] = {}
        self._workers = workers
        self._run = Run.create_empty(1)
        self._groups: deque[_Group] = deque()
        self._count = itertools.count()
        # Flower puts the process's task into every message; this process has only one task.
        TaskIdentity.run_id = self._run.run_id
        TaskIdentity.node_id = SERVER
        TaskIdentity.task_id = 1

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message from the coordinator to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return every node's id."""
        return list(range(SERVER + 1, SERVER + 1 + len(self._nodes)))

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return Flower's description of every node, with its id."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; return their ids in the same order."""
        identifiers = []
        group: _Group | None = None
        for message in messages:
            identifier = f"local-{next(self._count)}"
            message.metadata.__dict__["_message_id"] = identifier
            message.metadata.ttl = DEFAULT_TTL  # a message that waits for a worker is not late
            if (
                group is None
                or len(group.waiting) == self._together
                or message.metadata.message_type != TRAIN
                or group.waiting[0][1].metadata.message_type != TRAIN
            ):
                group = _Group()
                self._groups.append(group)
            group.waiting.append((identifier, message))
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to ``message_ids`` that are due, in the order of their messages.

        At most two groups per worker are started in advance, so that few replies wait in memory.
        """
        replies = []
        for identifier in message_ids:
            self._start_some()
            if not self._groups or self._groups[0].waiting[0][0] != identifier:
                continue
            group = self._groups[0]
            assert group.future is not None  # noqa: S101  # the oldest group was started above
            try:
                answers = group.future.result(WAIT)
            except TimeoutError:
                continue
            _, message = group.waiting.popleft()
            reply, state = answers.pop(0)
            self._remember(message.metadata.dst_node_id, state)
            replies.append(reply)
            if not group.waiting:
                self._groups.popleft()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push ``messages`` and return every reply; these nodes always answer."""
        waiting = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(waiting):
            replies.extend(self.pull_messages(waiting))
        return replies

    def _start_some(self) -> None:
        ahead = 2 * max(self._workers.count, 1)
        for group in itertools.islice(self._groups, ahead):
            if group.future is None:
                asked = [self._asked(message) for _, message in group.waiting]
                group.future = self._workers.submit(_reply, self._answer, asked)

    def _asked(self, message: Message) -> "_Asked":
        node = message.metadata.dst_node_id
        config = dict(self._nodes[node - SERVER - 1])
        return message, node, config, self._states.get(node) or RecordDict()

    def _remember(self, node: int, state: RecordDict) -> None:
        """Keep a node's state only if it is not empty: few of thousands of nodes have a state."""
        if state:
            self._states[node] = state
        else:
            self._states.pop(node, None)


_Asked = tuple[Message, int, dict[str, str], RecordDict]  # message, node, its config and state


def _reply(answer: Answer, asked: Sequence[_Asked]) -> list[_Replied]:
    """Return each node's reply to its message, and its state after it.

    Any worker can continue with the state. An exception becomes Flower's error code, as in Flower.
    """
    pairs = [
        (
            Message(RecordDict(dict(message.content)), metadata=message.metadata),
            Context(
                run_id=message.metadata.run_id,
                node_id=node,
                node_config=dict(config),
                state=state,
                run_config={},
            ),
        )
        for message, node, config, state in asked
    ]
    try:
        replies = answer(pairs)
    except Exception as error:
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        replies = [
            Message(Error(code, type(error).__name__), reply_to=message) for message, _ in pairs
        ]
    for reply, (message, _) in zip(replies, pairs, strict=True):
        reply.metadata.__dict__["_message_id"] = f"{message.metadata.message_id}-reply"
    return [(reply, context.state) for reply, (_, context) in zip(replies, pairs, strict=True)]
