"""What every rule must do: move an adapter, go on after a crash, work under masks or say no."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.contract import (
    MASKED,
    OneRound,
    card_model,
    check_resumed,
    distance,
    outputs,
    same,
)
from support.contract_digits import BACKBONE, DigitsCase
from support.contract_refusals import check_asked, check_texts

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.aggregation import RULES, Rule
from fedgraft.common.errors import JobError
from fedgraft.server.plan import make_plan


@pytest.fixture(scope="module", params=list(RULES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DigitsCase]:
    """Digits at two sites under a rule."""
    over = {"aggregation": {"rule": request.param}}
    yield DigitsCase(tmp_path_factory.mktemp(request.param), over)


@pytest.fixture(scope="module")
def rule(case: DigitsCase) -> Rule:
    """The rule of ``case``."""
    return case.job.rule


def test_two_rounds_move_what_travels(case: DigitsCase) -> None:
    federation = case.federation
    run, final = federation.trained
    start = federation.bench.initial_of(federation.exchanged)
    assert distance(final, start) > 1e-3 and np.isfinite(final).all()
    assert [(line["round"], line["sites"], line["dropped"]) for line in run.history()] == [
        (1, 2, []),
        (2, 2, []),
    ]
    assert run.history()[-1]["validation"]["examples"] > 0


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(case: DigitsCase) -> None:
    check_resumed(case.federation, *case.federation.trained)


@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_what_travels_what_stays_and_what_is_fixed_are_the_whole_layout(
    case: DigitsCase, rule: Rule, head: str
) -> None:
    job = case.ask({"method": {"head": head}})
    bench = open_workbench(job)
    plan = make_plan(job, bench, "")
    travels, stays = set(plan.exchanged.names), set(bench.local.names)
    assert travels and not travels & stays
    assert travels | stays <= set(bench.layout.names)
    assert bool(stays) == job.keeps_own
    kept = {name for name in bench.layout.names if rule.keeps(name)}
    assert kept <= stays and not kept & set(rule.exchanges(bench.layout))
    assert plan.request.names == plan.exchanged.names
    fixed = [name for name in bench.layout.names if name not in travels | stays]
    values = bench.initial_of(bench.layout.only(fixed))
    # What is fixed is drawn alike everywhere: sites compare its hash.
    assert bool(plan.request.fixed) and (not fixed or values.any())
    other = bench.fixed_hash({*travels, *stays, *fixed})
    assert (plan.request.fixed != other) == bool(fixed)


def test_masked_is_clear_or_is_refused(case: DigitsCase, rule: Rule, tmp_path: Path) -> None:
    over = {"simulation": {"sites": 3}}
    assert (rule.needs == "sum") == ("secure_aggregation" not in rule.refuses)
    if rule.needs != "sum":
        with pytest.raises(JobError) as caught:
            case.ask({**over, "privacy": MASKED})
        assert caught.value.hint
        return
    jobs = case.ask(over), case.ask({**over, "privacy": MASKED})
    clear, masked = (OneRound(job, tmp_path / str(at)) for at, job in enumerate(jobs))
    assert masked.record.masked is not None and masked.record.masked["clipped"] == 0.0
    bound = masked.record.masked["error_bound"]
    assert 0 < bound < distance(clear.state.adapter, clear.start.adapter) / 10
    assert distance(masked.state.adapter, clear.state.adapter) <= bound + 1e-7
    ours, theirs = (one.count(clear.state.adapter) for one in (masked, clear))
    assert theirs.tally.examples > 0
    assert np.array_equal(ours.tally.counts, theirs.tally.counts)


def test_the_export_is_the_federations_model_and_says_what_stayed(
    case: DigitsCase, rule: Rule
) -> None:
    federation = case.federation
    run, final = federation.trained
    examples = federation.site(run).splits(case.job).test
    inputs = examples.batch(np.arange(len(examples)))
    bench = federation.bench
    untrained = outputs(bench.model, inputs)
    bench.put((federation.exchanged, final))
    trained = outputs(bench.model, inputs)
    bench.put()
    assert not same(trained, untrained, 1e-3)
    loaded = card_model(run.folder / "adapter", BACKBONE)
    assert same(outputs(loaded, inputs), trained, 1e-5)
    note = rule.card_note(own_parts=False, shared_head=True)
    assert bool(note) == rule.keeps_own
    # What stays at a site does not go back with the adapter.
    assert rule.keeps_own <= ("early_stopping" in rule.refuses)
    assert note in (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_each_refusal_is_of_a_feature_and_is_refused(case: DigitsCase, rule: Rule) -> None:
    check_texts(rule.refuses, case.job)
    check_asked(rule.refuses, case.ask)


def test_a_round_under_way_can_be_kept(rule: Rule) -> None:
    draw = np.random.default_rng(0)
    updates = draw.normal(size=(3, 7)).astype(np.float32)
    whole = rule.collect(7)
    with pytest.raises(ZeroDivisionError):
        whole.combined()
    for at, update in enumerate(updates):
        whole.add(update, at + 1)
    begun = rule.collect(7)
    begun.add(updates[0], 1)
    again = rule.collect(7)
    again.restore({name: values.copy() for name, values in begun.kept().items()})
    for at, update in enumerate(updates[1:], 1):
        again.add(update, at + 1)
    assert whole.count == again.count == 3
    assert whole.combined().tobytes() == again.combined().tobytes()
    alike = rule.collect(7)
    for weight in (1, 5):
        alike.add(updates[0], weight)
    np.testing.assert_allclose(rule.merge(alike.combined()), updates[0], rtol=1e-6)
