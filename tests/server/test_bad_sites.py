"""Whatever a site says, it changes nothing but its own part."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, RecordDict
from support.rounds_in_memory import (
    MemoryGrid,
    Said,
    Site,
    constant,
    federate,
    make_job,
    make_plan_of,
    spoilt,
    transport_to,
)

from fedgraft.common.messages.payloads import EvaluateReply, EvaluateRequest, Refusal, TrainRequest
from fedgraft.server.rounds import run_job
from fedgraft.server.state import Dropped, RoundRecord, State

# What others do


def _changed(**changes: Any) -> Callable[[Site, TrainRequest], Said]:
    return lambda site, request: replace(site.honest(request), **changes)


def _replayed(site: Site, request: TrainRequest) -> Said:
    if request.round == 1:
        return Refusal(request.session, "busy")
    return site.honest(site.trained[0])  # what it would have said to the first request


HOSTILE: dict[str, tuple[Callable[[Site, TrainRequest], Said], str]] = {
    "nan": (spoilt, "not-finite"),
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
