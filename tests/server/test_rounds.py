"""A federation's story: honest sites decide the adapter, round after round."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Error
from support.rounds_in_memory import (
    SESSION,
    MemoryGrid,
    Outcome,
    Said,
    Site,
    constant,
    federate,
    make_job,
    make_plan_of,
    spoilt,
    transport_to,
)

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import TooFewSites
from fedgraft.common.layout import Layout, is_factor_a, is_factor_b, is_head
from fedgraft.common.messages.payloads import TrainReply, TrainRequest
from fedgraft.server import optimizers
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.rounds import run_job, run_round
from fedgraft.server.state import Moments, State

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


# Too few sites


def test_a_run_gives_up_after_three_rounds_with_too_few_sites() -> None:
    job = make_job(rounds={"min_sites": 2})
    bad = Site("bad", train=spoilt)
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


# Costs


def test_the_record_holds_the_bytes_of_every_message() -> None:
    job = make_job(rounds={"count": 1})
    sites = [Site("a"), Site("b"), Site("bad", train=spoilt)]
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


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedsa"])
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_a_plan_exchanges_what_the_rule_and_the_head_policy_say(rule: str, head: str) -> None:
    plan, bench = _real_plan(rule, head)
    names = plan.exchanged.names
    assert any(map(is_factor_a, names)) == (rule != "ffa")
    assert any(map(is_head, names)) == (head == "shared")
    assert any(map(is_factor_b, names)) == (rule != "fedsa")
    request = plan.request
    assert (request.session, request.names) == (SESSION, names)
    assert request.layout == plan.exchanged.fingerprint
    assert request.backbone == bench.backbone.fingerprint
    assert request.fixed == bench.fixed_hash({*names, *bench.local.names})


def test_a_plan_tells_sites_nothing_of_the_coordinators_files() -> None:
    plan, _ = _real_plan("fedavg", "shared")
    assert "/secret" not in plan.request.job
    assert Job.model_validate_json(plan.request.job).simulation is None
