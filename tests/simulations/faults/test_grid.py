"""A grid in which sites vanish, are late and lie, through the coordinator's own transport."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masked_federations import Consortium, make_job
from support.matrix import tries

from fedgraft.common.config.faults import Faults
from fedgraft.common.errors import SiteFailure, TooFewSites
from fedgraft.common.messages.codec import Stage, decode, encode
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    PlanReply,
    PlanRequest,
    Refusal,
    Request,
    SharesAsk,
    TrainReply,
    TrainRequest,
    UnmaskAsk,
)
from fedgraft.common.secagg.statements import SharesRequest, Survivors, UnmaskRequest
from fedgraft.server.protocol.transport import Reply, Transport
from fedgraft.server.rounds import run_round
from fedgraft.simulations.faults.grid import FaultyGrid
from fedgraft.simulations.faults.plan import NEVER, Fates, Step
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers

SESSION = "session"
UPDATE = np.array([1, -2, 3], np.float32)
DEADLINE = 100.0
ASKED: list[tuple[str, str]] = []


def app(message: Message, context: Context) -> Message:
    """A site that answers anything at once; the one called ``sulky`` refuses to train."""
    site, stage = str(context.node_config["site"]), Stage(message.metadata.message_type)
    ASKED.append((site, stage.value))
    if stage is Stage.PLAN:
        return Message(encode(PlanReply(SESSION, site)), reply_to=message)
    if stage is Stage.EVALUATE:
        reply = EvaluateReply(SESSION, 1, np.zeros(5))
        return Message(encode(reply), reply_to=message)
    if stage is not Stage.TRAIN:
        return Message(encode(Refusal(SESSION, "no-masks-here")), reply_to=message)
    if site == "broken":
        raise SiteFailure("broken")
    if site == "sulky":
        return Message(encode(Refusal(SESSION, "sulks")), reply_to=message)
    number = decode(message.content, TrainRequest).round
    return Message(encode(TrainReply(SESSION, number, "l", 1, 0.5, UPDATE)), reply_to=message)


def answer(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    return [app(message, context) for message, context in asked]


@dataclass(frozen=True)
class Planned(Fates):
    """Fates that a test has chosen: stages at which sites vanish, and delays in seconds."""

    gone: dict[str, int] = field(default_factory=dict)
    delays: dict[str, float] = field(default_factory=dict)

    def vanishes(self, step: Step, site: str) -> int:
        return self.gone.get(site, NEVER)

    def delay(self, step: Step, site: str) -> float:
        return self.delays.get(site, 0.0)


def plan(
    gone: dict[str, int] | None = None,
    delays: dict[str, float] | None = None,
    poisoned: tuple[str, ...] = (),
    poison: str = "nan",
) -> Planned:
    settings = Faults.model_validate({"poisoned": float(bool(poisoned)), "poison": poison})
    return Planned(settings, 0, (), poisoned, gone or {}, delays or {})


@dataclass
class Federation:
    """Named sites behind a faulty grid, all of them invited; what the coordinator sees of them."""

    fates: Fates
    names: Sequence[str] = "abcdef"
    waits: list[tuple[Step, Stage, float]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        nodes = [{"site": one} for one in self.names]
        inner = LocalGrid(nodes, Workers(0, device="cpu"), answer=answer)
        self.grid = FaultyGrid(inner, self.fates, lambda *wait: self.waits.append(wait))
        self.transport = Transport(self.grid, clock=self.grid.clock, pause=self.pauses.append)
        request = PlanRequest(SESSION, "{}", "b", "l", ("w",), "f")
        agreed = list(self.transport.invite(request, DEADLINE))
        assert [reply.site for reply in agreed] == list(self.names)
        assert not any(reply.failure for reply in agreed)
        ASKED.clear()

    def train(self, number: int = 1, attempt: int = 0) -> list[Reply]:
        request = TrainRequest(SESSION, number, attempt, "{}", ("w",), UPDATE)
        return list(self.transport.ask(self.names, Stage.TRAIN, request, DEADLINE))

    def evaluate(self, number: int = 1) -> list[Reply]:
        request = EvaluateRequest(SESSION, number, "{}", ("w",), "validation", UPDATE)
        return list(self.transport.ask(self.names, Stage.EVALUATE, request, DEADLINE))


def outcomes(replies: Sequence[Reply]) -> list[tuple[str, str]]:
    return [(reply.site, reply.failure) for reply in replies]


def test_without_faults_replies_are_those_of_the_grid_inside() -> None:
    federation = Federation(plan())
    assert outcomes(federation.train()) == [(site, "") for site in "abcdef"]
    assert federation.grid.clock() == 0.0 and federation.waits == []


def test_an_invitation_is_never_lost() -> None:
    doomed = plan(gone=dict.fromkeys("abcdef", 0), delays=dict.fromkeys("abcdef", 1e9))
    federation = Federation(doomed)
    again = Transport(federation.grid, clock=federation.grid.clock)
    request = PlanRequest(SESSION, "{}", "b", "l", ("w",), "f")
    assert not any(reply.failure for reply in again.invite(request, DEADLINE))
    assert again.sites == tuple("abcdef")


def test_who_vanishes_is_never_asked_and_costs_the_deadline() -> None:
    federation = Federation(plan(gone={"b": 4, "e": 0}))  # in clear the stage does not matter
    replies = federation.train()
    assert outcomes(replies) == [(s, "") for s in "acdf"] + [("b", "deadline"), ("e", "deadline")]
    assert [site for site, _ in ASKED] == list("acdf")
    assert federation.grid.clock() == DEADLINE
    assert federation.waits == [(Step(1, 0, "train"), Stage.TRAIN, DEADLINE)]


def test_a_late_reply_comes_after_all_others_in_the_order_of_delays() -> None:
    federation = Federation(plan(delays={"a": 30.0, "c": 10.0, "d": 99.0}))
    assert outcomes(federation.train()) == [(site, "") for site in "befcad"]
    assert federation.grid.clock() == 99.0
    assert federation.waits == [(Step(1, 0, "train"), Stage.TRAIN, 99.0)]


def test_a_reply_beyond_the_deadline_is_lost_though_its_site_did_the_work() -> None:
    federation = Federation(plan(delays={"a": DEADLINE, "c": 10.0}))
    assert outcomes(federation.train()) == [(s, "") for s in "bdefc"] + [("a", "deadline")]
    assert sorted(site for site, _ in ASKED) == list("abcdef")
    assert federation.grid.clock() == DEADLINE


def test_nobody_really_waits() -> None:
    late = {"a": 99.0, "b": 1e9, "c": 50.0}
    federation = Federation(plan(gone={"d": 0}, delays=late))
    for number in range(1, 5):
        federation.train(number)
    assert federation.grid.clock() == 4 * DEADLINE
    assert sum(federation.pauses) < 0.1


@settings(max_examples=tries(60), deadline=None)
@given(
    gone=st.sets(st.sampled_from("abcdef")),
    delays=st.dictionaries(
        st.sampled_from("abcdef"), st.sampled_from([0.5, 1.0, 30.0, 99.9, 100.0, 1e6])
    ),
    rounds=st.integers(1, 3),
)
def test_exactly_those_reply_who_are_there_in_time(
    gone: set[str], delays: dict[str, float], rounds: int
) -> None:
    federation = Federation(plan(gone=dict.fromkeys(gone, 2), delays=delays))
    when = {site: inf if site in gone else delays.get(site, 0.0) for site in "abcdef"}
    wanted = sorted((s for s in when if when[s] < DEADLINE), key=lambda s: (when[s], s))
    for number in range(1, rounds + 1):
        replies = outcomes(federation.train(number))
        came = [site for site, failure in replies if not failure]
        assert [when[site] for site in came] == [when[site] for site in wanted]
        assert sorted(came) == sorted(wanted)
        assert sorted(replies) == sorted(
            (site, "" if when[site] < DEADLINE else "deadline") for site in when
        )
    last = min(max(when.values()), DEADLINE)
    assert federation.grid.clock() == pytest.approx(rounds * last)
    assert [seconds for *_, seconds in federation.waits] == ([last] * rounds if last else [])


def test_validation_belongs_to_the_attempt_that_trained() -> None:
    seen: list[Step] = []

    class Watched(Planned):
        def vanishes(self, step: Step, site: str) -> int:
            seen.append(step)
            return NEVER

    federation = Federation(Watched(Faults(dropout=0.5), 0, (), ()))
    federation.train(4, attempt=2)
    federation.evaluate(4)
    federation.evaluate(7)
    steps = [Step(4, 2, "train"), Step(4, 2, "evaluate"), Step(7, 0, "evaluate")]
    assert list(dict.fromkeys(seen)) == steps


@pytest.mark.parametrize("poison", ["sign-flip", "nan", "noise"])
def test_an_update_is_poisoned_on_its_way_and_nothing_else_of_the_reply(poison: str) -> None:
    federation = Federation(plan(poisoned=("b",), poison=poison))
    payloads = {reply.site: reply.payload for reply in federation.train()}
    for site, payload in payloads.items():
        assert isinstance(payload, TrainReply)
        assert np.array_equal(payload.update, UPDATE) == (site != "b")
        assert (payload.session, payload.examples, payload.loss) == (SESSION, 1, 0.5)
    assert not any(reply.failure for reply in federation.evaluate())


def test_what_is_no_update_passes_as_it_is() -> None:
    names = ("broken", "sulky", "well")
    federation = Federation(plan(poisoned=names, poison="nan"), names)
    assert outcomes(federation.train()) == [
        ("broken", "app-failed"),
        ("sulky", "sulks"),
        ("well", ""),
    ]


def test_sending_and_receiving_gives_what_is_not_lost() -> None:
    federation = Federation(plan(gone={"a": 0}, delays={"b": 5.0, "c": 1e9}), "abcd")
    request = encode(TrainRequest(SESSION, 1, 0, "{}", ("w",), UPDATE))
    nodes = list(federation.grid.get_node_ids())
    messages = [Message(request, node, "train", ttl=DEADLINE) for node in nodes]
    replies = list(federation.grid.send_and_receive(messages))
    assert [reply.metadata.src_node_id for reply in replies] == [nodes[3], nodes[1]]


# Masked rounds


def masked_round(consortium: Consortium, fates: Fates) -> tuple[dict[str, list[str]], object]:
    """One round from the start: who was asked at each stage, and the new state or the error."""
    inner = consortium.grid()
    grid = FaultyGrid(inner, fates)
    transport = Transport(grid, clock=grid.clock)
    assert consortium.federation is not None
    replies = transport.invite(consortium.plan.request, 60, members=consortium.federation.ids)
    assert not any(reply.failure for reply in replies)
    outcome: object
    try:
        outcome = run_round(consortium.plan, transport, consortium.start)
    except TooFewSites as error:
        outcome = error
    stages = ("keys", "shares", "train", "confirm", "unmask")
    return {stage: inner.who(stage) for stage in stages}, outcome


@pytest.mark.parametrize("stage", range(5))
def test_a_site_that_vanishes_in_a_masked_round_stays_away(
    tmp_path_factory: pytest.TempPathFactory, stage: int
) -> None:
    job = make_job(privacy={"dropouts": 0.2, "colluders": 0.2})
    consortium = Consortium(tmp_path_factory.mktemp("sites"), job)
    asked, outcome = masked_round(consortium, plan(gone={"elm": stage}))
    for number, who in enumerate(asked.values()):
        assert ("elm" in who) == (number < stage)
        assert {*who, "elm"} == set(consortium.names)
    assert isinstance(outcome, tuple)
    state, record = outcome
    assert [(drop.site, drop.reason) for drop in record.dropped] == [("elm", "deadline")]
    # Before its masked input it is not in the sum, afterwards it is.
    left = [name for name in consortium.names if name != "elm" or stage > 2]
    assert record.sites == len(left)
    assert np.abs(state.adapter - consortium.mean_of(left)).max() < 1e-5
    assert np.abs(state.adapter - consortium.mean_of(consortium.names)).max() > 1e-5 or stage > 2


def test_who_has_vanished_is_gone_also_when_asked_again() -> None:
    """The coordinator would not ask it; the grid does not rely on that."""
    federation = Federation(plan(gone={"b": 3}), "abc")
    asks: dict[Stage, Request] = {
        Stage.SHARES: SharesAsk(SESSION, SharesRequest(())),
        Stage.CONFIRM: ConfirmAsk(SESSION, Survivors((), (), ())),
        Stage.UNMASK: UnmaskAsk(SESSION, UnmaskRequest(())),
    }
    for stage, ask in asks.items():
        list(federation.transport.ask("abc", stage, ask, DEADLINE))
    assert [stage for site, stage in ASKED if site == "b"] == [Stage.SHARES.value]
    assert len(ASKED) == 3 * 2 + 1


def test_too_many_that_vanish_abort_a_masked_round(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job())
    _, outcome = masked_round(consortium, plan(gone={"ash": 2, "elm": 2, "fir": 2}))
    assert isinstance(outcome, TooFewSites)
