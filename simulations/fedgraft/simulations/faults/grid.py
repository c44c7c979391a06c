"""A Flower ``Grid`` around another in which sites vanish, are late and lie; nobody really waits.

Coordinator, sites and the grid inside know nothing of it. Time is virtual: it stands while any site
works, and when all have answered that will, it jumps to the next late reply, and at last to the
deadline of those that are lost. ``Transport`` with this ``clock`` then does what it does in a
federation. A late site has done its work, as a real one would have; a vanished one was never asked.
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
"""Told after a stage for whose replies the coordinator would have waited so many seconds."""

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
    """A message of the stage under way; its reply comes ``delay`` seconds after it was sent.

    With a delay of ``inf`` it never does. The grid inside has a message that is ``running``.
    """

    node: int
    stage: Stage
    deadline: float
    delay: float = 0.0
    running: bool = True
    reply: Message | None = None


class FaultyGrid(Grid):
    """``grid`` with the faults of ``fates``; one stage at a time, as the coordinator asks."""

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
        self._late: list[tuple[float, str]] = []  # a heap of replies that came, by their delay
        self._lost = itertools.count()

    def clock(self) -> float:
        """Virtual seconds since the grid was made."""
        return self._now

    def set_run(self, run: Run) -> None:
        """Take ``run`` as the run messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run messages belong to."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message from the coordinator to a node."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Every node's id."""
        return list(self._grid.get_node_ids())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Every node, as Flower describes nodes."""
        return list(self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send the messages that find their site; an id for each, also for those that do not."""
        fates = [(message, self._fate(message)) for message in messages]
        sent = iter(self._grid.push_messages([one for one, asked in fates if asked.running]))
        # A grid answers a message it could not send with an empty id, a whole batch with none.
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
        """The replies to ``message_ids`` that are there; time jumps if none can come before."""
        replies = []
        for identifier in message_ids:
            asked = self._open.get(identifier)
            if asked is None:
                continue
            if asked.running:
                self._receive(identifier, asked)
            if self._is_next(identifier, asked):
                assert asked.reply is not None  # noqa: S101  # only those that came are next
                replies.append(asked.reply)
                del self._open[identifier]
                if not self._open:
                    self._end(asked.stage, asked.delay)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push ``messages`` and wait, in virtual time, for every reply that is not lost."""
        waiting = list(self.push_messages(messages))
        replies: list[Message] = []
        while self._open:
            replies.extend(self.pull_messages(waiting))
        return replies

    def _fate(self, message: Message) -> _Asked:
        """Whether the message finds its site, and how late the reply will be."""
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
            return asked  # keys and signatures take even a slow machine no time to speak of
        delay = self._fates.delay(self._step, site)
        return replace(asked, delay=delay if delay < asked.deadline else inf)

    def _receive(self, identifier: str, asked: _Asked) -> None:
        """Take the reply if the grid inside has it by now; of one that is lost keep nothing."""
        for reply in self._grid.pull_messages([identifier]):
            asked.running = False
            self._running -= 1
            if asked.delay == inf:
                continue
            asked.reply = self._passed_on(asked, reply)
            if asked.delay:
                heapq.heappush(self._late, (asked.delay, identifier))

    def _passed_on(self, asked: _Asked, reply: Message) -> Message:
        """The reply as it will reach the coordinator; notes who sits at the node."""
        if reply.has_error():
            return reply
        try:
            if asked.stage is Stage.PLAN:
                self._sites[asked.node] = decode(reply.content, PlanReply).site
            elif asked.stage is Stage.TRAIN and self._fates.settings.poisons_updates:
                trained = decode(reply.content, TrainReply)
                update = self._fates.poison(trained.update, self._step, self._sites[asked.node])
                reply.content = encode(replace(trained, update=update))
        except MessageError:  # a refusal, or something that the coordinator will refuse
            pass
        return reply

    def _is_next(self, identifier: str, asked: _Asked) -> bool:
        """Whether this reply is the next to arrive, if need be after waiting for it."""
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
        """The stage is over after so many seconds; what is still open is lost."""
        self._open = {}
        if seconds:
            self._waited(self._step, stage, seconds)


def _step(message: Message, before: Step) -> Step:
    """The step that ``message`` begins, or the one that it goes on with.

    A masked step is named by its first message; validation belongs to the attempt that trained.
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
