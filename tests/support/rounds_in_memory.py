"""Sites in memory, honest or hostile, and the coordinator's loop over them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.codec import decode, encode, wire_bytes
from fedgraft.common.messages.payloads import (
    EvaluateReply,
    EvaluateRequest,
    PlanReply,
    PlanRequest,
    TrainReply,
    TrainRequest,
)
from fedgraft.common.metrics.tally import Tally
from fedgraft.server.plan import Plan
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.rounds import run_job
from fedgraft.server.state import Dropped, RoundRecord, State

__all__ = [
    "LAYOUT",
    "SESSION",
    "MemoryGrid",
    "Outcome",
    "Said",
    "Site",
    "constant",
    "federate",
    "make_job",
    "make_plan_of",
    "spoilt",
    "transport_to",
]

Said = Any  # a payload, a record, a Flower error, or None for no reply at all
SESSION = "0" * 32
LAYOUT = Layout(("w",), ((4,),))


@dataclass
class Site:
    """A site in memory; ``train`` and ``evaluate`` may be replaced by anything hostile.

    Its update is drawn from its name and the round, so that it is the same in every run.
    """

    name: str
    examples: int = 10
    train: Callable[["Site", TrainRequest], Said] = lambda site, request: site.honest(request)
    evaluate: Callable[["Site", EvaluateRequest], Said] = lambda site, request: site.tally(request)
    trained: list[TrainRequest] = field(default_factory=list)
    evaluated: list[EvaluateRequest] = field(default_factory=list)

    def honest(self, request: TrainRequest) -> TrainReply:
        draw = np.random.default_rng([request.round, *self.name.encode()])
        update = draw.normal(size=request.adapter.shape).astype(np.float32)
        layout = Layout(("w",), (request.adapter.shape,)).fingerprint
        loss = float(draw.uniform(0.1, 2))
        return TrainReply(request.session, request.round, layout, self.examples, loss, update)

    def tally(self, request: EvaluateRequest) -> EvaluateReply:
        right = len(self.name)
        tally = Tally(0.25 * right, np.array([[right, 1], [0, 2]]))
        return EvaluateReply(request.session, request.round, tally.to_vector())

    def answer(self, message: Message) -> Said:
        kind = message.metadata.message_type
        if kind == "query.plan":
            request = decode(message.content, PlanRequest)
            return PlanReply(request.session, self.name)
        if kind == "train":
            asked = decode(message.content, TrainRequest)
            self.trained.append(asked)
            return self.train(self, asked)
        wanted = decode(message.content, EvaluateRequest)
        self.evaluated.append(wanted)
        return self.evaluate(self, wanted)


class MemoryGrid(Grid):  # type: ignore[misc]  # flwr is untyped here
    """These sites as nodes; a reply is made when it is pulled, and its bytes are added up."""

    def __init__(self, sites: Sequence[Site]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.sites = dict(enumerate(sites, 11))
        self.bytes_up = self.bytes_down = 0
        self._waiting: dict[str, Message] = {}
        self._count = itertools.count()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            identifier = f"message-{next(self._count)}"
            self._waiting[identifier] = message
            self.bytes_down += wire_bytes(message.content)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            message = self._waiting[identifier]
            said = self.sites[message.metadata.dst_node_id].answer(message)
            if said is None:
                continue
            del self._waiting[identifier]
            content = said if isinstance(said, RecordDict | Error) else encode(said)
            if isinstance(content, RecordDict):
                self.bytes_up += wire_bytes(content)
            replies.append(Message(content, reply_to=message))
        return replies

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError


def make_job(
    *, rounds: dict[str, Any] | None = None, validation: float = 0.1, **aggregation: Any
) -> Job:
    raw = {
        "job": {"name": "test", "task": "image-classification", "labels": ["no", "yes"]},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "lora", "head": "shared"},
        "rounds": {"count": 3, "deadline": 5.0, **(rounds or {})},
        "aggregation": aggregation,
        "data": {"validation": validation},
    }
    return parse_job(raw, where="test")


def make_plan_of(job: Job, layout: Layout = LAYOUT) -> Plan:
    request = PlanRequest(SESSION, "{}", "backbone", layout.fingerprint, layout.names, "fixed")
    return Plan(job, SESSION, layout, request)


def transport_to(grid: Grid) -> Transport:
    """Time passes only while the transport waits."""
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    return Transport(grid, clock=lambda: now[0], pause=pause)


@dataclass
class Outcome:
    """What a run left: its last state, every commit in order, every warning."""

    state: State
    commits: list[tuple[State, RoundRecord]]
    warnings: list[tuple[str, tuple[Dropped, ...]]]
    grid: MemoryGrid

    @property
    def records(self) -> list[RoundRecord]:
        return [record for _, record in self.commits]


def federate(
    job: Job, sites: Sequence[Site], state: State | None = None, layout: Layout = LAYOUT
) -> Outcome:
    outcome = Outcome(
        state or State(0, np.zeros(layout.size, np.float32)), [], [], MemoryGrid(sites)
    )
    outcome.state = run_job(
        make_plan_of(job, layout),
        transport_to(outcome.grid),
        outcome.state,
        commit=lambda state, record: outcome.commits.append((state, record)),
        warn=lambda what, dropped: outcome.warnings.append((what, tuple(dropped))),
    )
    return outcome


def constant(*values: float, loss: float = 1.0) -> Callable[[Site, TrainRequest], TrainReply]:
    update = np.array(values, np.float32)
    return lambda site, request: replace(site.honest(request), update=update, loss=loss)


def spoilt(site: Site, request: TrainRequest) -> Said:
    reply = site.honest(request)
    reply.update[2] = np.nan
    return reply
