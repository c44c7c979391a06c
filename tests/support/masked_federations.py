"""Masked federations for tests: real sites with a few real digits, some of which misbehave.

A node's ``faults`` say what its site does instead of answering: ``"train=silent unmask/2=refuse"``
names stages, where it matters which time the site is asked, and an action of ``ACTIONS``.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedgraft.client import app as client
from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.training.trainer import Trained, Wanted, train_together
from fedgraft.common.adapters.model import cache_folder, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.federation.federation_file import Federation
from fedgraft.common.layout import Vector
from fedgraft.common.messages.codec import Stage, decode, encode
from fedgraft.common.messages.payloads import (
    EvaluateRequest,
    KeysAsk,
    PlanReply,
    Refusal,
    TrainReply,
    TrainRequest,
)
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    MaskedInput,
    Opening,
    SealedShares,
)
from fedgraft.server.app import coordinate
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.protocol.masked import Masking
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.rounds import run_round
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import RoundRecord, State
from fedgraft.simulations.demo import digits
from fedgraft.simulations.grid.identities import FILE, found_federation
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers

__all__ = [
    "NAMES",
    "REPLIES",
    "SESSION",
    "SIZES",
    "STAGES",
    "Consortium",
    "Recorder",
    "make_job",
    "saying",
]

NAMES = ("ash", "beech", "cedar", "elm", "fir", "oak")  # in the order of their ids
SIZES = (9, 11, 8, 13, 10, 12)
STAGES = ("keys", "shares", "train", "confirm", "unmask")
SESSION = "0123456789abcdef" * 2
NONE: Mapping[str, str] = MappingProxyType({})
REPLIES = (Advertisement, SealedShares, MaskedInput, Confirmation, Opening)


def make_job(
    *,
    masked: bool = True,
    validation: float = 0.0,
    method: Mapping[str, Any] = MappingProxyType({}),
    aggregation: Mapping[str, Any] = MappingProxyType({}),
    privacy: Mapping[str, Any] = MappingProxyType({}),
    **rounds: Any,
) -> Job:
    """A small job on digits; with ``masked``, fine enough that rounding hides no mistake."""
    settings = {"enabled": masked, "max_sites": 8, "max_weight": 64, **privacy}
    lora = {"kind": "lora", "rank": 1, "targets": ["q_proj"], "head": "shared"}
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": list(digits.NAMES)},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {**lora, **method},
        "training": {"batch_size": 8, "learning_rate": 5e-3},
        "rounds": {"count": 2, **rounds},
        "aggregation": dict(aggregation),
        "privacy": {"secure_aggregation": settings},
        "data": {"validation": validation, "normalize": "per-image"},
    }
    return parse_job(raw, where="test")


@cache
def site_file(name: str, size: int) -> Path:
    """The ``site.toml`` of a site with ``size`` digits, other ones for every name in NAMES."""
    folder = cache_folder() / "masked-sites" / f"{name}-{size}"
    folder.mkdir(parents=True)
    first = 60 * (NAMES.index(name) if name in NAMES else 0)
    rows = digits.load()[0].select(range(first, first + size))
    rows.to_parquet(folder / "train.parquet")
    path = folder / "site.toml"
    path.write_text(f'name = "{name}"\ndevice = "cpu"\n[data]\ntrain = "train.parquet"\n')
    return path


class Recorder(LocalGrid):
    """A grid that keeps what was asked and what came back: (stage, site, content or None)."""

    def __init__(
        self,
        names: Sequence[str],
        nodes: Sequence[Mapping[str, str]],
        workers: Workers,
        *,
        together: int = 1,
    ) -> None:
        super().__init__(nodes, workers, answer=answer, together=together)
        self._names = dict(enumerate(names, 2))
        self.asked: list[tuple[str, str, RecordDict]] = []
        self.replies: list[tuple[str, str, RecordDict | None]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            site = self._names[message.metadata.dst_node_id]
            self.asked.append((_stage(message), site, message.content))
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            content = None if reply.has_error() else reply.content
            self.replies.append((_stage(reply), self._names[reply.metadata.src_node_id], content))
        return replies

    def who(self, stage: str) -> list[str]:
        """The sites that were asked at this stage, in order."""
        return [site for name, site, _ in self.asked if name == stage]


@dataclass
class Consortium:
    """Sites with identities, a plan, and a state folder each below ``folder``."""

    folder: Path
    job: Job
    sites: int = 5
    sizes: Sequence[int] = SIZES
    numbers: Iterable[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.names = NAMES[: self.sites]
        self.federation = found_federation(self.job, self.folder, self.names)
        masking = Masking(self.federation, iter(self.numbers).__next__) if self.federation else None
        self.plan: Plan = make_plan(self.job, open_workbench(self.job), SESSION, masking)
        start = open_workbench(self.job).initial_of(self.plan.exchanged)
        self.start = State(0, start)

    @property
    def known(self) -> Federation:
        """The federation of a masked job."""
        assert self.federation is not None
        return self.federation

    def node(self, name: str, faults: str = "") -> dict[str, str]:
        """How Flower would configure the site's node."""
        size = self.sizes[NAMES.index(name)] if name in NAMES else self.sizes[0]
        node = {"site": str(site_file(name, size)), "state": str(self.folder / name)}
        if self.federation:
            node["federation"] = str(self.folder / FILE)
        return node | ({"faults": faults} if faults else {})

    def grid(
        self,
        faults: Mapping[str, str] = NONE,
        workers: Workers | None = None,
        *,
        together: int = 1,
    ) -> Recorder:
        """The sites, and whoever else has faults, as nodes; ``together`` without faults only."""
        names = [*self.names, *(name for name in faults if name not in self.names)]
        nodes = [self.node(name, faults.get(name, "")) for name in names]
        crew = workers or Workers(0, device="cpu")
        return Recorder(names, nodes, crew, together=together)

    def transport(self, grid: Recorder) -> Transport:
        """To these sites, all of them invited; time stands still."""
        transport = Transport(grid, clock=lambda: 0.0)
        members = self.federation.ids if self.federation else None
        refused = [r for r in transport.invite(self.plan.request, 60, members=members) if r.failure]
        assert not refused, refused
        return transport

    def run_round(
        self, faults: Mapping[str, str] = NONE, *, workers: Workers | None = None, together: int = 1
    ) -> tuple[State, RoundRecord, Recorder]:
        """One round from the start."""
        grid = self.grid(faults, workers, together=together)
        state, record = run_round(self.plan, self.transport(grid), self.start)
        return state, record, grid

    def participant(self, name: str) -> Participant:
        """The site, with a state of its own: what it does here is not in the federation."""
        return open_participant({**self.node(name), "state": str(self.folder / "aside" / name)})

    def training(self, attempt: int = 0) -> TrainRequest:
        """What the plan has sites train in the first round."""
        names, adapter = self.plan.exchanged.names, self.start.adapter
        return TrainRequest(SESSION, 1, attempt, self.plan.request.job, names, adapter)

    def evaluating(self) -> EvaluateRequest:
        """What the plan has sites evaluate, were the adapter that of the start."""
        names, adapter = self.plan.exchanged.names, self.start.adapter
        return EvaluateRequest(SESSION, 1, self.plan.request.job, names, "validation", adapter)

    def trained(self, name: str, attempt: int = 0) -> TrainReply:
        """What the site would reply in clear."""
        return train_together([self.participant(name).train(self.training(attempt))])[0]

    def mean_of(self, names: Iterable[str], attempt: int = 0) -> Vector:
        """The adapter after one round in clear with these sites."""
        said = [self.trained(name, attempt) for name in names]
        uniform = self.job.aggregation.weights == "uniform"
        weights = np.array([1 if uniform else reply.examples for reply in said], np.float64)
        updates = np.stack([reply.update.astype(np.float64) for reply in said])
        mean: Vector = self.start.adapter + weights @ updates / weights.sum()
        return mean


def saying(
    reply: TrainReply,
) -> Callable[[Participant, TrainRequest], Generator[Wanted, Trained, TrainReply]]:
    """A ``Participant.train`` that replies this, without training anything."""

    def train(
        participant: Participant, request: TrainRequest
    ) -> Generator[Wanted, Trained, TrainReply]:
        yield from ()
        return reply

    return train


@dataclass
class MaskedRun:
    """A run of a consortium whose sites lie in it."""

    run: Run
    consortium: Consortium
    records: list[RoundRecord] = field(default_factory=list)
    grids: list[Recorder] = field(default_factory=list)

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any], **more: Any) -> "MaskedRun":
        run = Run.create(folder, make_job(**settings))
        return cls(run, Consortium(run.folder / "sites", run.job, **more))

    def go(
        self,
        faults: Mapping[str, str] | None = None,
        *,
        workers: int = 0,
        stop_after: int | None = None,
    ) -> Vector:
        """Run, or go on with, the job; the final adapter."""

        def on_round(record: RoundRecord) -> None:
            self.records.append(record)
            if record.round == stop_after:
                raise KeyboardInterrupt

        with Run(self.run.folder) as run, Workers(workers, device="cpu") as crew:
            grid = self.consortium.grid(faults or {}, crew)
            self.grids.append(grid)
            transport = Transport(grid, clock=lambda: 0.0)
            return coordinate(
                transport, run.job, run, federation=self.consortium.known, on_round=on_round
            )

    @property
    def facts(self) -> list[dict[str, Any]]:
        """All that a round came to but how long it took."""
        return [replace(record, seconds=0.0).to_json() for record in self.records]

    @property
    def numbers(self) -> list[int]:
        """The numbers of masked rounds, as sites were told them."""
        asked = [part for grid in self.grids for part in grid.asked if part[0] == "keys"]
        found = [decode(content, KeysAsk).request.round for _, _, content in asked]
        return list(dict.fromkeys(found))


# Sites that misbehave


def app(message: Message, context: Context) -> Message:
    """The site's ``ClientApp``, but for the faults of this node."""
    stage = _stage(message)
    asked = dict(context.state.get("asked", {}))
    count = asked[stage] = int(asked.get(stage, 0)) + 1
    context.state["asked"] = ConfigRecord(asked)
    faults = dict(part.split("=") for part in str(context.node_config.get("faults", "")).split())
    action = faults.get(stage) or faults.get(f"{stage}/{count}")
    return ACTIONS[action](message, context) if action else client.app(message, context)


def answer(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """One site with its faults; several together are asked without any."""
    return client.train_all(asked) if len(asked) > 1 else [app(*asked[0])]


def _stage(message: Message) -> str:
    return Stage(message.metadata.message_type).name.lower()


def _silent(message: Message, context: Context) -> Message:
    raise ConnectionError("gone")


def _lost(message: Message, context: Context) -> Message:
    """The site answers, and the answer does not arrive."""
    client.app(message, context)
    raise ConnectionError("gone")


def _refuse(message: Message, context: Context) -> Message:
    return Message(encode(Refusal(SESSION, "abstained")), reply_to=message)


def _garbage(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def _agree(message: Message, context: Context) -> Message:
    return Message(encode(PlanReply(SESSION, "mallory")), reply_to=message)


def _stranger(message: Message, context: Context) -> Message:
    """A proper answer under the id of another site."""
    said: Any = decode(client.app(message, context).content, *REPLIES)
    return Message(encode(replace(said, site=said.site ^ 1)), reply_to=message)


def _spoil(message: Message, context: Context) -> Message:
    """An answer of the right form with a wrong signature, ciphertext, vector or share."""
    said: Any = decode(client.app(message, context).content, *REPLIES)
    if isinstance(said, SealedShares):
        bent = tuple(replace(each, ciphertext=bytes(80)) for each in said.envelopes)
        said = replace(said, envelopes=bent)
    elif isinstance(said, MaskedInput):
        said = replace(said, packed=np.roll(said.packed, 1))
    elif isinstance(said, Opening):
        said = replace(said, shares=tuple(replace(each, share=bytes(32)) for each in said.shares))
    else:
        said = replace(said, signature=bytes(64))
    return Message(encode(said), reply_to=message)


ACTIONS: dict[str, Callable[[Message, Context], Message]] = {
    "silent": _silent,
    "lost": _lost,
    "refuse": _refuse,
    "garbage": _garbage,
    "agree": _agree,
    "stranger": _stranger,
    "spoil": _spoil,
}
