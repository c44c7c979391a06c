"""Validation by the sites, and the adapter that is kept when it gets no better."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.federations import digits_job
from support.rounds_in_memory import SESSION, Outcome, Site, federate, make_job

from fedgraft.common.config.sections import EarlyStopping
from fedgraft.common.messages.payloads import EvaluateReply, EvaluateRequest
from fedgraft.common.metrics.tally import Tally
from fedgraft.server.export.adapter import origin_of
from fedgraft.server.rounds import _judge
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import RoundRecord, State, kept_validation

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


# The validation of the adapter that is kept


@given(
    st.lists(st.none() | st.lists(st.integers(0, 9), min_size=4, max_size=4), max_size=8),
    st.sampled_from(("loss", "accuracy", "macro_f1")),
    st.sampled_from((0.0, 0.2)),
)
def test_the_kept_validation_is_that_of_the_adapter_early_stopping_keeps(
    rounds: list[list[int] | None], metric: Any, min_delta: float
) -> None:
    stopping = EarlyStopping(metric=metric, min_delta=min_delta)
    job = digits_job()
    job = job.model_copy(
        update={"rounds": job.rounds.model_copy(update={"early_stopping": stopping})}
    )
    state, history = State(0, np.zeros(1, np.float32)), []
    for at, counts in enumerate(rounds, 1):
        confusion = np.array(counts or [0] * 4, np.int64).reshape(2, 2)
        tally = Tally(float(at % 3), confusion)
        line = tally.summary() | {"round": at} if tally.examples else None
        history.append({"validation": line})
        state = _judge(job, replace(state, adapter=np.full(1, at, np.float32)), tally)
    kept = kept_validation(history, stopping)
    assert (kept and kept["round"]) == (None if state.best is None else int(state.best[0]))


def test_without_early_stopping_the_last_round_counts() -> None:
    history = [{"validation": {"accuracy": 0.9}}, {"validation": {"accuracy": 0.1}}]
    assert kept_validation(history, None) == {"accuracy": 0.1}
    assert kept_validation([*history, {"validation": None}], None) is None  # not of that adapter
    assert kept_validation([], None) is None


def test_the_card_of_an_export_has_the_validation_of_its_adapter(tmp_path: Path) -> None:
    from support.run_folders import LAYOUT, make_state

    run = Run.create(tmp_path, digits_job())
    for number, loss in ((1, 0.5), (2, 0.2), (3, 0.9)):
        found = {"accuracy": 1 - loss, "macro_f1": 1 - loss, "loss": loss, "examples": 8}
        record = RoundRecord(number, 3, 3, (), 20, 0.5, 0.1, found, 10, 10, 1.0)
        run.commit(make_state(number), record, LAYOUT)
    assert origin_of(run).validation["loss"] == 0.9
    rounds = run.job.rounds.model_copy(update={"early_stopping": EarlyStopping(metric="loss")})
    run.job = run.job.model_copy(update={"rounds": rounds})
    assert origin_of(run).validation["loss"] == 0.2
