"""What every rule must do: move an adapter, go on after a crash, work under masks or say no."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.contract import (
    MASKED,
    OneRound,
    card_model,
    check_resumed,
    distance,
    outputs,
    same,
    still_modules,
)
from support.contract_digits import BACKBONE, DigitsCase
from support.contract_refusals import check_asked, check_texts

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.aggregation import RULES, Rule
from fedgraft.common.errors import JobError
from fedgraft.common.layout import is_head
from fedgraft.server.plan import make_plan

Step = tuple[NDArray[np.float64], NDArray[np.float64]]


@pytest.fixture(scope="module", params=list(RULES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DigitsCase]:
    """Digits at two sites of unequal sizes under a rule."""
    over = {
        "aggregation": {"rule": request.param},
        "simulation": {"partition": {"kind": "dirichlet", "alpha": 1.0}},
    }
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
    assert still_modules(federation, start, final) == []
    sizes = {len(federation.site(run, at).splits(case.job).train) for at in range(2)}
    assert len(sizes) == 2  # so weights matter
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
    heads = {name for name in bench.layout.names if is_head(name)}
    assert heads - kept <= set(rule.exchanges(bench.layout))
    assert head != "shared" or heads - kept <= travels
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


def step_of(rule: Rule, updates: NDArray[np.float32], weights: Sequence[float]) -> Step:
    """The step of the adapter by updates [sites, size], and the collector's combination of them."""
    collector = rule.collect(updates.shape[1])
    before = updates.tobytes()
    for update, weight in zip(updates, weights, strict=True):
        collector.add(update, weight)
    combined = collector.combined()
    step = rule.merge(combined.copy())
    assert combined.dtype == step.dtype == np.float64
    assert combined.shape == step.shape == updates.shape[1:]
    assert updates.tobytes() == before
    return step, combined


def test_sites_of_unequal_sizes_count_as_the_rule_says(rule: Rule) -> None:
    draw = np.random.default_rng(1)
    updates = draw.normal(size=(7, 40)).astype(np.float32)
    weights = np.array([1.0, 40.0, 7.0, 3.0, 250.0, 12.0, 5.0])
    step, combined = step_of(rule, updates, weights.tolist())
    order = draw.permutation(7)
    again, _ = step_of(rule, updates[order], weights[order].tolist())
    np.testing.assert_allclose(again, step, rtol=0, atol=1e-12)  # whoever answers first
    if rule.needs == "sum":
        wanted = sum(
            w * update.astype(np.float64) for w, update in zip(weights, updates, strict=True)
        )
        np.testing.assert_allclose(combined, wanted / weights.sum(), rtol=0, atol=1e-12)
    # A majority decides; as the order is no matter, so does any majority.
    others = np.concatenate([draw.normal(size=(4, 40)).astype(np.float32), updates[4:]])
    other, _ = step_of(rule, others, weights.tolist())
    assert np.abs(other - step).max() > 1e-3
    alike, _ = step_of(rule, np.repeat(updates[:1], 7, axis=0), weights.tolist())
    np.testing.assert_allclose(alike, updates[0], rtol=1e-6)


def test_a_round_under_way_can_be_kept(rule: Rule) -> None:
    draw = np.random.default_rng(0)
    updates = draw.normal(size=(6, 7)).astype(np.float32)
    whole = rule.collect(7)
    with pytest.raises(ZeroDivisionError):
        whole.combined()
    for at, update in enumerate(updates):
        whole.add(update, at + 1)
    for done in range(7):
        begun = rule.collect(7)
        for at, update in enumerate(updates[:done]):
            begun.add(update, at + 1)
        again = rule.collect(7)
        again.restore({name: values.copy() for name, values in begun.kept().items()})
        assert again.count == done
        for at, update in enumerate(updates[done:], done):
            again.add(update, at + 1)
        assert whole.count == again.count == 6
        assert whole.combined().tobytes() == again.combined().tobytes()
