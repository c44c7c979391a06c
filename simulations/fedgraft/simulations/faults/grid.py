"""A Flower ``Grid`` around another ``Grid``, in which sites vanish, are late or send wrong updates.

Coordinator, sites and the inner grid do not know about the faults. Time is virtual, so that no
process really waits. Time stands still while any site works. When all sites that will answer have
answered, it jumps to the next late reply, and at the end to the deadline of the lost replies.
``Transport`` with this ``clock`` then behaves as in a real federation. A late site has done its
work, like a real late site; a vanished site was never asked.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedgraft.common.errors import MessageError
from fedgraft.common.messages.codec import Stage, decode, encode
from fedgraft.common.messages.payloads import PlanReply, TrainReply
from fedgraft.simulations.faults.plan import NEVER, Fates, Step

__all__ = ["FaultyGrid", "Waited"]

Waited = Callable[[Step, Stage, float], None]
"""Called after a stage, with the seconds that the coordinator would have waited for replies."""

CLEAR = ("TrainRequest", "EvaluateRequest")
ORDER = {
    Stage.KEYS: 0,
    Stage.SHARES: 1,
    Stage.TRAIN: 2,
    Stage.EVALUATE: 2,
    Stage.CONFIRM: 3,
    Stage.UNMASK: 4,
}


@dataclass
class _Asked:
    """A message of the current stage; its reply comes ``delay`` seconds after it was sent.

    With a delay of ``inf``, the reply never comes. The inner grid still has the message if it is
    ``running``.
    """

    node: int
    stage: Stage
    deadline: float
    delay: float = 0.0
    running: bool = True
    reply: Message | None = None


class FaultyGrid(Grid):
    """``grid`` with the faults of ``fates``; it handles one stage at a time, in order."""

    def __init__(
        self, grid: Grid, fates: Fates, waited: Waited = lambda step, stage, seconds: None
    ) -> None:
        self._grid = grid
        self._fates = fates
        self._waited = waited
        self._sites: dict[int, str] = {}  # by node, from their replies to PLAN
        self._step = Step(0, 0, "")
        self._now = self._start = 0.0
        self._open: dict[str, _Asked] = {}
        self._running = 0
        self._late: list[tuple[float, str]] = []  # a heap of late replies, by their delay
        self._lost = itertools.count()

    def clock(self) -> float:
        """Return the virtual seconds since the grid was made."""
        return self._now

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message from the coordinator to a node."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return every node's id."""
        return list(self._grid.get_node_ids())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return Flower's description of every node."""
        return list(self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send the messages whose site has not vanished; return an id for every message."""
        fates = [(message, self._fate(message)) for message in messages]
        sent = iter(self._grid.push_messages([one for one, asked in fates if asked.running]))
        # For a message that it could not send, a grid returns an empty id; for a batch, no ids.
        identifiers = [
            next(sent, "") if asked.running else f"lost-{next(self._lost)}" for _, asked in fates
        ]
        pairs = [(name, asked) for name, (_, asked) in zip(identifiers, fates, strict=True)]
        self._open = {identifier: one for identifier, one in pairs if identifier}
        self._running = sum(one.running for one in self._open.values())
        self._late = []
        self._start = self._now
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to ``message_ids`` that are there.

        Time jumps to the next late reply if no reply can come earlier.
        """
        replies = []
        for identifier in message_ids:
            asked = self._open.get(identifier)
            if asked is None:
                continue
            if asked.running:
                self._receive(identifier, asked)
            if self._is_next(identifier, asked):
                assert asked.reply is not None  # noqa: S101  # a reply that is next has come
                replies.append(asked.reply)
                del self._open[identifier]
                if not self._open:
                    self._end(asked.stage, asked.delay)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push ``messages``, wait in virtual time, and return every reply that is not lost."""
        waiting = list(self.push_messages(messages))
        replies: list[Message] = []
        while self._open:
            replies.extend(self.pull_messages(waiting))
        return replies

    def _fate(self, message: Message) -> _Asked:
        """Return the fate of a message: its site has vanished or not, and the reply's delay."""
        stage, node = Stage(message.metadata.message_type), message.metadata.dst_node_id
        asked = _Asked(node, stage, message.metadata.ttl)
        site = self._sites.get(node)
        if stage is Stage.PLAN or site is None:
            return asked
        self._step = _step(message, self._step)
        gone = self._fates.vanishes(self._step, site)
        clear = message.content["payload"]["kind"] in CLEAR
        if gone != NEVER and (clear or ORDER[stage] >= gone):
            return replace(asked, delay=inf, running=False)
        if stage not in (Stage.TRAIN, Stage.EVALUATE):
            return asked  # keys and signatures take even a slow machine almost no time
        delay = self._fates.delay(self._step, site)
        return replace(asked, delay=delay if delay < asked.deadline else inf)

    def _receive(self, identifier: str, asked: _Asked) -> None:
        """Take the reply if the inner grid has it; do not keep a lost reply."""
        for reply in self._grid.pull_messages([identifier]):
            asked.running = False
            self._running -= 1
            if asked.delay == inf:
                continue
            asked.reply = self._passed_on(asked, reply)
            if asked.delay:
                heapq.heappush(self._late, (asked.delay, identifier))

    def _passed_on(self, asked: _Asked, reply: Message) -> Message:
        """Return the reply that reaches the coordinator, and record the name of the node's site."""
        if reply.has_error():
            return reply
        try:
            if asked.stage is Stage.PLAN:
                self._sites[asked.node] = decode(reply.content, PlanReply).site
            elif asked.stage is Stage.TRAIN and self._fates.settings.poisons_updates:
                trained = decode(reply.content, TrainReply)
                update = self._fates.poison(trained.update, self._step, self._sites[asked.node])
                reply.content = encode(replace(trained, update=update))
        except MessageError:  # a refusal, or a reply that the coordinator will refuse
            pass
        return reply

    def _is_next(self, identifier: str, asked: _Asked) -> bool:
        """Return whether this reply is the next to arrive; move the clock if it is late."""
        if not asked.delay:
            return asked.reply is not None
        if self._running:
            return False
        if not self._late:
            self._now = self._start + asked.deadline
            self._end(asked.stage, asked.deadline)
            return False
        if self._late[0][1] != identifier:
            return False
        heapq.heappop(self._late)
        self._now = self._start + asked.delay
        return True

    def _end(self, stage: Stage, seconds: float) -> None:
        """End the stage after ``seconds``; replies that have not come are lost."""
        self._open = {}
        if seconds:
            self._waited(self._step, stage, seconds)


def _step(message: Message, before: Step) -> Step:
    """Return the step that ``message`` begins, or the step ``before`` that it continues.

    The first message of a masked step names it. Validation belongs to the attempt that trained.
    """
    payload = message.content["payload"]
    kind = str(payload["kind"])
    if kind not in (*CLEAR, "KeysAsk"):
        return before
    prefix = "work." if kind == "KeysAsk" else ""
    number = int(payload[f"{prefix}round"])
    work = str(payload["work.stage"]) if prefix else message.metadata.message_type
    if work == Stage.TRAIN:
        return Step(number, int(payload[f"{prefix}attempt"]), work)
    return Step(number, before.attempt if before.round == number else 0, work)
