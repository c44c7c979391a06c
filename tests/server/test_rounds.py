"""A federation's story: honest sites decide the adapter, whatever the others do."""

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.common.adapters import Layout, is_factor_a, is_head
from fedgraft.common.errors import TooFewSites
from fedgraft.common.job import Job
from fedgraft.common.jobfile import parse_job
from fedgraft.common.messages import decode, encode, wire_bytes
from fedgraft.common.metrics import Tally
from fedgraft.common.payloads import (
    EvaluateReply,
    EvaluateRequest,
    PlanReply,
    PlanRequest,
    Refusal,
    TrainReply,
    TrainRequest,
)
from fedgraft.common.workbench import open_workbench
from fedgraft.server.aggregation import optimizers
from fedgraft.server.rounds import Plan, choose_cohort, make_plan, run_job, run_round
from fedgraft.server.state import Dropped, Moments, RoundRecord, State
from fedgraft.server.transport import Transport

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


# What honest sites make of an adapter


def test_the_adapter_moves_by_the_mean_weighted_by_examples() -> None:
    a = Site("a", 1, constant(0, 0, 0, 8, loss=1.0))
    b = Site("b", 3, constant(4, 0, 0, 0, loss=2.0))
    start = State(0, np.ones(4, np.float32))
    outcome = federate(make_job(rounds={"count": 1}), [a, b], start)
    assert outcome.state.adapter.tolist() == [4, 1, 1, 3]
    assert outcome.state.adapter.dtype == np.float32
    (record,) = outcome.records
    assert (record.sites, record.examples, record.train_loss) == (2, 4, 1.75)
    assert record.update_norm == pytest.approx(13**0.5)


def test_uniform_weights_count_every_site_once() -> None:
    a = Site("a", 1, constant(0, 0, 0, 8, loss=1.0))
    b = Site("b", 3, constant(4, 0, 0, 0, loss=2.0))
    outcome = federate(make_job(rounds={"count": 1}, weights="uniform"), [a, b])
    assert outcome.state.adapter.tolist() == [2, 0, 0, 4]
    assert outcome.records[0].train_loss == 1.75  # still a mean over examples


def test_every_round_trains_from_the_adapter_of_the_round_before() -> None:
    a, b = Site("a"), Site("b")
    outcome = federate(make_job(), [a, b])
    starts = [np.zeros(4, np.float32), *(state.adapter for state, _ in outcome.commits)]
    for number, request in enumerate(a.trained, 1):
        assert (request.session, request.round, request.names) == (SESSION, number, ("w",))
        assert np.array_equal(request.adapter, starts[number - 1])
    assert [record.round for record in outcome.records] == [1, 2, 3]
    assert [state.round for state, _ in outcome.commits] == [1, 2, 3]
    assert len(a.trained) == len(b.trained) == 3


def test_the_servers_optimiser_moves_the_adapter_and_keeps_its_moments() -> None:
    job = make_job(rounds={"count": 2}, server_optimizer={"kind": "adam", "learning_rate": 0.1})
    site = Site("a")
    outcome = federate(job, [site])
    x: Any = np.zeros(4, np.float32)
    moments: Moments = {}
    for request in site.trained:
        step = site.honest(request).update.astype(np.float64)
        x, moments = optimizers.apply(job.aggregation.server_optimizer, x, step, moments)
    np.testing.assert_allclose(outcome.state.adapter, x, rtol=1e-6)
    assert sorted(outcome.state.moments) == ["m", "v"]
    np.testing.assert_allclose(outcome.state.moments["v"], moments["v"], rtol=1e-12)


def test_reptiles_steps_shrink_from_round_to_round() -> None:
    job = make_job(rounds={"count": 4}, server_optimizer={"kind": "reptile", "learning_rate": 0.5})
    site = Site("a")
    outcome = federate(job, [site])
    x = np.zeros(4, np.float32)
    for request, share in zip(site.trained, (1, 0.75, 0.5, 0.25), strict=True):
        assert np.array_equal(request.adapter, x)
        x = (x + 0.5 * share * site.honest(request).update.astype(np.float64)).astype(np.float32)
    assert np.array_equal(outcome.state.adapter, x)
    assert not outcome.state.moments


def test_a_run_continues_after_its_state_and_does_not_start_again() -> None:
    job = make_job()
    whole = federate(job, [Site("a"), Site("b")])
    after_one = whole.commits[0][0]
    site = Site("a")
    rest = federate(job, [site, Site("b")], after_one)
    assert [request.round for request in site.trained] == [2, 3]
    assert rest.state.adapter.tobytes() == whole.state.adapter.tobytes()


def test_a_run_that_is_done_asks_nobody() -> None:
    site = Site("a")
    outcome = federate(make_job(), [site], State(3, np.ones(4, np.float32)))
    assert outcome.commits == [] and site.trained == []
    assert outcome.state.adapter.tolist() == [1, 1, 1, 1]


# What others do


def _changed(**changes: Any) -> Callable[[Site, TrainRequest], Said]:
    return lambda site, request: replace(site.honest(request), **changes)


def _spoilt(site: Site, request: TrainRequest) -> Said:
    reply = site.honest(request)
    reply.update[2] = np.nan
    return reply


def _replayed(site: Site, request: TrainRequest) -> Said:
    if request.round == 1:
        return Refusal(request.session, "busy")
    return site.honest(site.trained[0])  # what it would have said to the first request


HOSTILE: dict[str, tuple[Callable[[Site, TrainRequest], Said], str]] = {
    "nan": (_spoilt, "not-finite"),
    "infinite": (_changed(update=np.full(4, np.inf, np.float32)), "not-finite"),
    "huge": (_changed(update=np.full(4, 1e30, np.float32)), "norm-too-large"),
    "shape": (_changed(update=np.ones(5, np.float32)), "wrong-shape"),
    "matrix": (_changed(update=np.ones((2, 2), np.float32)), "wrong-shape"),
    "double": (_changed(update=np.ones(4, np.float64)), "wrong-dtype"),
    "many": (_changed(examples=10**12), "bad-count"),
    "none": (_changed(examples=0), "bad-count"),
    "negative": (_changed(examples=-9), "bad-count"),
    "loss": (_changed(loss=float("nan")), "bad-loss"),
    "stale": (
        lambda site, request: replace(site.honest(request), round=request.round - 1),
        "wrong-round",
    ),
    "ahead": (
        lambda site, request: replace(site.honest(request), round=request.round + 1),
        "wrong-round",
    ),
    "replay": (_replayed, "wrong-round"),
    "session": (_changed(session="1" * 32), "wrong-session"),
    "layout": (_changed(layout="f" * 64), "wrong-layout"),
    "crash": (lambda site, request: Error(2, "KeyError: 'patient Ada'"), "app-failed"),
    "gone": (lambda site, request: Error(5, ""), "site-unreachable"),
    "refusal": (lambda site, request: Refusal(request.session, "out-of-disk"), "out-of-disk"),
    "garbage": (lambda site, request: RecordDict(), "malformed"),
    "confused": (lambda site, request: site.tally(request), "malformed"),  # type: ignore[arg-type]
    "late": (lambda site, request: None, "deadline"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_site_changes_nothing_but_its_own_part(kind: str) -> None:
    train, reason = HOSTILE[kind]
    job = make_job(server_optimizer={"kind": "adam"})
    # The first to be asked, so that its reply would be the first in the sum.
    bad = Site("bad", 50, train, evaluate=lambda site, request: Error(2, ""))
    honest = federate(job, [Site("a", 3), Site("b", 7), Site("c", 5)])
    mixed = federate(job, [bad, Site("a", 3), Site("b", 7), Site("c", 5)])
    assert mixed.state.adapter.tobytes() == honest.state.adapter.tobytes()
    assert all(
        mixed.state.moments[name].tobytes() == value.tobytes()
        for name, value in honest.state.moments.items()
    )
    for told, plain in zip(mixed.records, honest.records, strict=True):
        drops = [drop.reason for drop in told.dropped if not drop.reason.startswith("evaluation")]
        assert drops == ["busy" if kind == "replay" and told.round == 1 else reason]
        assert {drop.site for drop in told.dropped} == {"bad"}
        for name in ("sites", "examples", "train_loss", "update_norm", "validation"):
            assert getattr(told, name) == getattr(plain, name)


def test_a_claimed_loss_cannot_make_the_record_infinite() -> None:
    bad = Site("bad", 1_000_000, _changed(loss=1e308))
    (record,) = federate(make_job(rounds={"count": 1}), [Site("a"), bad]).records
    json.dumps(record.to_json(), allow_nan=False)


def _tally(*values: float, dtype: Any = np.float64) -> Callable[[Site, EvaluateRequest], Said]:
    vector = np.array(values, dtype)
    return lambda site, request: EvaluateReply(request.session, request.round, vector)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(
    "evaluate",
    [
        _tally(np.nan, 1, 1, 1, 1),
        _tally(1, 1, 1, 1),
        _tally(1, -5, 1, 1, 1),
        _tally(1, 2.0**62, 2.0**62, 2.0**62, 2.0**62),
        _tally(1e308, 1, 1, 1, 1),
        _tally(-1e308, 1, 1, 1, 1),
        _tally(0, 1, 1, 1, 1, dtype="U3"),
        lambda site, request: replace(site.tally(request), round=request.round - 1),
        lambda site, request: replace(site.tally(request), session="1" * 32),
        lambda site, request: Error(8, ""),
        lambda site, request: RecordDict(),
        lambda site, request: Refusal(request.session, "loss-not-finite"),
        lambda site, request: None,
    ],
    ids=[
        *("nan", "short", "negative", "overflow", "loss", "best", "text", "round", "session"),
        *("died", "empty", "refusal", "late"),
    ],
)
def test_a_bad_evaluation_does_not_count_but_the_update_does(
    evaluate: Callable[[Site, EvaluateRequest], Said],
) -> None:
    job = make_job(rounds={"count": 1})
    bad = Site("bad", evaluate=evaluate)
    outcome = federate(job, [bad, Site("a")])
    (record,) = outcome.records
    assert record.sites == 2
    assert record.validation == {
        "accuracy": 0.75,
        "loss": 0.0625,
        "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2),
        "weighted_f1": pytest.approx((2 / 3 + 4 / 5) / 2),
        "balanced_accuracy": 0.75,
        "examples": 4,
    }
    (drop,) = record.dropped
    assert drop.site == "bad" and drop.reason.startswith("evaluation: ")


def test_a_site_without_examples_to_validate_on_is_not_dropped() -> None:
    small = Site("small", evaluate=lambda site, request: Refusal(request.session, "no-examples"))
    (record,) = federate(make_job(rounds={"count": 1}), [small, Site("a")]).records
    assert record.dropped == ()
    assert record.validation is not None and record.validation["examples"] == 4


def test_validation_that_no_site_could_do_is_none() -> None:
    small = Site("small", evaluate=lambda site, request: Refusal(request.session, "no-examples"))
    (record,) = federate(make_job(rounds={"count": 1}), [small]).records
    assert record.validation is None


def test_two_nodes_of_one_name_count_once() -> None:
    real, thief = Site("a", train=constant(1, 1, 1, 1)), Site("a", train=constant(9, 9, 9, 9))
    outcome = federate(
        make_job(rounds={"count": 1}), [real, thief, Site("b", 10, constant(3, 3, 3, 3))]
    )
    assert outcome.state.adapter.tolist() == [2, 2, 2, 2]
    assert thief.trained == []
    assert outcome.warnings == [("refused to take part", (Dropped("a", "name-taken"),))]


def test_a_site_that_comes_later_takes_part_from_then_on() -> None:
    job = make_job()
    late, grid = Site("late"), MemoryGrid([Site("a")])
    numbers: list[int] = []

    def commit(state: State, record: RoundRecord) -> None:
        numbers.append(record.sites)
        grid.sites[99] = late

    run_job(
        make_plan_of(job),
        transport_to(grid),
        State(0, np.zeros(4, np.float32)),
        commit=commit,
        warn=lambda what, dropped: None,
    )
    assert numbers == [1, 2, 2]
    assert [request.round for request in late.trained] == [2, 3]


# Too few sites


def test_a_run_gives_up_after_three_rounds_with_too_few_sites() -> None:
    job = make_job(rounds={"min_sites": 2})
    bad = Site("bad", train=_spoilt)
    late = Site("late", train=lambda site, request: None)
    start = State(1, np.arange(4, dtype=np.float32), {"m": np.ones(4)}, stale=1)
    grid, told, commits = MemoryGrid([bad, Site("a"), late]), [], []
    with pytest.raises(TooFewSites) as caught:
        run_job(
            make_plan_of(job),
            transport_to(grid),
            start,
            commit=lambda state, record: commits.append(record),
            warn=lambda what, dropped: told.append(what),
        )
    message = str(caught.value)
    assert "round 2: 1 usable updates, min_sites is 2" in message
    assert "bad: not-finite" in message and "late: deadline" in message
    assert "rounds.min_sites" in caught.value.hint
    assert caught.value.exit_code == 4
    assert commits == []
    assert [request.round for request in bad.trained] == [2, 2, 2]
    assert len(told) == 3 and set(told) == {message}
    assert (start.round, start.stale) == (1, 1)
    assert start.adapter.tolist() == [0, 1, 2, 3] and start.moments["m"].tolist() == [1] * 4


def test_a_round_is_repeated_from_the_same_state_until_it_has_enough_sites() -> None:
    def flaky(site: Site, request: TrainRequest) -> Said:
        tries = sum(asked.round == request.round for asked in site.trained)
        return site.honest(request) if tries == 3 else Error(5, "")

    job = make_job(rounds={"count": 2, "min_sites": 2})
    site = Site("flaky", train=flaky)
    outcome = federate(job, [site, Site("a")])
    # Two failures a round, never three in a row.
    assert [request.round for request in site.trained] == [1, 1, 1, 2, 2, 2]
    assert len(outcome.warnings) == 4
    steady = federate(job, [Site("flaky"), Site("a")])
    assert outcome.state.adapter.tobytes() == steady.state.adapter.tobytes()


def test_no_sites_at_all_are_too_few() -> None:
    with pytest.raises(TooFewSites, match="0 usable updates"):
        federate(make_job(), [])


# Cohorts

NAMES = [f"site-{number}" for number in range(10)]
subsets = st.sets(st.sampled_from(NAMES), min_size=4).map(sorted)


@given(subsets, st.integers(1, 50), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_cohort_does_not_depend_on_the_order_of_the_sites(
    sites: list[str], number: int, seed: int, shuffle: Any
) -> None:
    job = make_job(rounds={"cohort": 3})
    job = job.model_copy(update={"job": job.job.model_copy(update={"seed": seed})})
    chosen = choose_cohort(job, sites, number)
    assert len(set(chosen)) == 3 and set(chosen) <= set(sites)
    shuffled = list(sites)
    shuffle.shuffle(shuffled)
    assert choose_cohort(job, shuffled, number) == chosen


@given(subsets, st.integers(1, 50))
def test_a_chosen_site_is_chosen_when_others_stay_away(sites: list[str], number: int) -> None:
    job = make_job(rounds={"cohort": 3})
    everyone = set(choose_cohort(job, NAMES, number))
    assert everyone & set(sites) <= set(choose_cohort(job, sites, number))


def test_every_site_is_chosen_sooner_or_later_and_about_as_often() -> None:
    job = make_job(rounds={"cohort": 3})
    chosen = [site for number in range(1, 401) for site in choose_cohort(job, NAMES, number)]
    counts = [chosen.count(site) for site in NAMES]
    assert 85 <= min(counts) <= max(counts) <= 155  # 120 expected, standard deviation 9


def test_cohorts_differ_between_rounds_and_between_seeds() -> None:
    job = make_job(rounds={"cohort": 3})
    other = job.model_copy(update={"job": job.job.model_copy(update={"seed": 1})})
    rounds = [choose_cohort(job, NAMES, number) for number in range(1, 11)]
    assert len(set(rounds)) > 5
    assert rounds != [choose_cohort(other, NAMES, number) for number in range(1, 11)]


@pytest.mark.parametrize(
    ("rounds", "size"),
    [({}, 10), ({"cohort": 4}, 4), ({"cohort": 99}, 10), ({"fraction": 0.25}, 2),
     ({"fraction": 0.01}, 1), ({"fraction": 1.0}, 10)],
)  # fmt: skip
def test_a_cohort_has_the_size_that_the_job_says(rounds: dict[str, Any], size: int) -> None:
    assert len(choose_cohort(make_job(rounds=rounds), NAMES, 1)) == size


def test_only_the_cohort_is_asked() -> None:
    sites = [Site(name) for name in NAMES]
    job = make_job(rounds={"cohort": 2, "count": 4})
    federate(job, sites)
    for number in range(1, 5):
        cohort = choose_cohort(job, NAMES, number)
        for site in sites:
            asked = any(request.round == number for request in site.trained)
            assert asked == (site.name in cohort)
            assert asked == any(request.round == number for request in site.evaluated)


# Validation and early stopping


def losing(*losses: float) -> Callable[[Site, EvaluateRequest], EvaluateReply]:
    """Validation losses by round; accuracy goes the same way."""

    def evaluate(site: Site, request: EvaluateRequest) -> EvaluateReply:
        loss = losses[request.round - 1]
        right = round(10 * loss)
        tally = Tally(20 * loss, np.array([[right, 20 - right], [0, 0]]))
        return EvaluateReply(request.session, request.round, tally.to_vector())

    return evaluate


def stopping(losses: Sequence[float], **settings: Any) -> Outcome:
    job = make_job(rounds={"count": len(losses), "early_stopping": settings})
    return federate(job, [Site("a", evaluate=losing(*losses))])


def test_validation_sees_the_new_adapter() -> None:
    site = Site("a")
    outcome = federate(make_job(), [site])
    assert len(site.evaluated) == 3
    for request, (state, _) in zip(site.evaluated, outcome.commits, strict=True):
        assert (request.session, request.round) == (SESSION, state.round)
        assert (request.split, request.names) == ("validation", ("w",))
        assert np.array_equal(request.adapter, state.adapter)


def test_validation_is_done_when_due_and_always_at_the_end() -> None:
    site = Site("a")
    outcome = federate(make_job(rounds={"count": 5, "evaluate_every": 2}), [site])
    assert [request.round for request in site.evaluated] == [2, 4, 5]
    due = [record.round for record in outcome.records if record.validation]
    assert due == [2, 4, 5]


def test_without_held_out_examples_nobody_is_asked_to_validate() -> None:
    site = Site("a")
    outcome = federate(make_job(validation=0), [site])
    assert site.evaluated == []
    assert [record.validation for record in outcome.records] == [None] * 3


def test_validation_is_that_of_all_sites_pooled() -> None:
    sites = [Site("a"), Site("bbb")]
    (record,) = federate(make_job(rounds={"count": 1}), sites).records
    assert record.validation is not None
    assert record.validation["examples"] == 10  # 4 + 6
    assert record.validation["accuracy"] == pytest.approx(0.8)  # (1 + 2 + 3 + 2) / 10
    assert record.validation["loss"] == pytest.approx(0.1)


def test_early_stopping_stops_and_keeps_the_best_adapter() -> None:
    outcome = stopping([1.0, 0.5, 0.7, 0.6, 0.1, 0.1], patience=2)
    assert [record.round for record in outcome.records] == [1, 2, 3, 4]
    assert outcome.state.stale == 2
    best = outcome.commits[1][0].adapter
    assert outcome.state.final.tobytes() == best.tobytes()
    assert outcome.state.final.tobytes() != outcome.state.adapter.tobytes()


def test_patience_starts_afresh_with_every_best() -> None:
    outcome = stopping([1.0, 1.1, 0.9, 1.0, 0.8, 0.9], patience=2)
    assert len(outcome.records) == 6
    assert outcome.state.final.tobytes() == outcome.commits[4][0].adapter.tobytes()


def test_a_gain_below_min_delta_is_none() -> None:
    outcome = stopping([1.0, 0.95, 0.92, 0.5], patience=2, min_delta=0.1)
    assert len(outcome.records) == 3
    assert outcome.state.final.tobytes() == outcome.commits[0][0].adapter.tobytes()


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_of_accuracy_more_is_better(metric: str) -> None:
    outcome = stopping([0.2, 0.8, 0.5, 0.4, 0.9], metric=metric, patience=2)
    assert len(outcome.records) == 4
    assert outcome.state.final.tobytes() == outcome.commits[1][0].adapter.tobytes()


def test_a_stopped_run_stays_stopped_when_it_is_resumed() -> None:
    job = make_job(rounds={"count": 9, "early_stopping": {"patience": 1}})
    losses = [1.0, 2.0, *[0.1] * 7]
    stopped = federate(job, [Site("a", evaluate=losing(*losses))])
    assert stopped.state.round == 2
    again = federate(job, [Site("a", evaluate=losing(*losses))], stopped.state)
    assert again.commits == []
    assert again.state.final.tobytes() == stopped.state.final.tobytes()


def test_without_early_stopping_the_last_adapter_is_final() -> None:
    job = make_job(rounds={"count": 3})
    outcome = federate(job, [Site("a", evaluate=losing(0.1, 2.0, 3.0))])
    assert outcome.state.best is None
    assert outcome.state.final.tobytes() == outcome.commits[2][0].adapter.tobytes()


# Costs


def test_the_record_holds_the_bytes_of_every_message() -> None:
    job = make_job(rounds={"count": 1})
    sites = [Site("a"), Site("b"), Site("bad", train=_spoilt)]
    outcome = Outcome(State(0, np.zeros(4, np.float32)), [], [], MemoryGrid(sites))
    transport = transport_to(outcome.grid)
    list(transport.invite(make_plan_of(job).request, 5.0))
    outcome.grid.bytes_up = outcome.grid.bytes_down = 0
    _, record = run_round(make_plan_of(job), transport, outcome.state)
    assert record.bytes_up == outcome.grid.bytes_up > 0
    assert record.bytes_down == outcome.grid.bytes_down > 0
    assert record.seconds >= 0


def _peak_memory(count: int, layout: Layout) -> int:
    def big(site: Site, request: TrainRequest) -> Said:
        update = np.full(layout.size, 1e-3, np.float32)
        return TrainReply(request.session, 1, layout.fingerprint, 1, 0.5, update)

    job = make_job(rounds={"count": 1})
    sites = [Site(f"site-{number}", train=big) for number in range(count)]
    for site in sites:  # the test's own record of requests would grow with the sites
        site.trained = _Forgetful()
        site.evaluated = _Forgetful()
    tracemalloc.start()
    outcome = federate(job, sites, layout=layout)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome.records[0].sites == count
    return peak


class _Forgetful(list[Any]):
    def append(self, item: Any) -> None:
        pass


def test_memory_does_not_grow_with_the_number_of_sites() -> None:
    layout = Layout(("w",), ((2**18,),))  # 1 MB
    few, many = _peak_memory(20, layout), _peak_memory(200, layout)
    # Keeping the updates would take 180 MB more; what the garbage collector has not met yet, a few.
    assert many < few + 18 * 2**20


# The plan

DIGITS = tuple(str(digit) for digit in range(10))


def _real_plan(rule: str, head: str) -> tuple[Plan, Any]:
    raw = {
        "job": {"name": "test", "task": "image-classification", "labels": list(DIGITS)},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "head": head},
        "aggregation": {"rule": rule},
        "simulation": {"train": "/secret/path/train.jsonl", "sites": 3},
    }
    job = parse_job(raw, where="test")
    bench = open_workbench(job)
    return make_plan(job, bench, SESSION), bench


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_a_plan_exchanges_what_the_rule_and_the_head_policy_say(rule: str, head: str) -> None:
    plan, bench = _real_plan(rule, head)
    names = plan.exchanged.names
    assert any(map(is_factor_a, names)) == (rule == "fedavg")
    assert any(map(is_head, names)) == (head == "shared")
    assert any(".lora_B." in name for name in names)
    request = plan.request
    assert (request.session, request.names) == (SESSION, names)
    assert request.layout == plan.exchanged.fingerprint
    assert request.backbone == bench.backbone.fingerprint
    assert request.fixed == bench.fixed_hash({*names, *bench.local.names})


def test_a_plan_tells_sites_nothing_of_the_coordinators_files() -> None:
    plan, _ = _real_plan("fedavg", "shared")
    assert "/secret" not in plan.request.job
    assert Job.model_validate_json(plan.request.job).simulation is None
