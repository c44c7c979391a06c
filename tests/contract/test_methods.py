"""What every method must do: train some parameters, and export them."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import PeftConfig
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
from support.trainings import felt, noisy

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import open_stack
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.errors import JobError
from fedgraft.common.layout import cut_rank, is_head
from fedgraft.common.methods import METHODS, HeadPolicy
from fedgraft.server.plan import make_plan

NEEDED: dict[str, dict[str, Any]] = {}
"""Values of the settings that a method has no default for, by its ``kind``."""


def settings_of(kind: str) -> dict[str, Any]:
    """The section with what it has no default for."""
    needed = NEEDED.get(kind, {})
    fields = METHODS[kind].model_fields
    missing = {name for name, field in fields.items() if field.is_required()}
    if missing := missing - {"kind", "head"} - needed.keys():
        raise NotImplementedError(f"{kind} has no default for {missing}: add values to NEEDED")
    return {"kind": kind, "head": "shared", **needed}


def heads_of(kind: str) -> tuple[str, ...]:
    """The policies for the head that a method has."""
    return get_args(METHODS[kind].model_fields["head"].annotation)


@pytest.fixture(scope="module", params=list(METHODS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DigitsCase:
    """Digits at two sites under a method."""
    over = {"method": settings_of(request.param)}
    return DigitsCase(tmp_path_factory.mktemp(request.param), over)


def test_something_trains_and_most_does_not(case: DigitsCase) -> None:
    bench, method = case.federation.bench, case.job.method
    layout = bench.layout
    assert layout.size and len(set(layout.names)) == len(layout.names)
    trains = {name for name, p in bench.model.named_parameters() if p.requires_grad}
    assert trains == set(layout.names)
    assert any(is_head(name) for name in layout.names)
    # ``low_rank`` is the rank that a site of a smaller rank cuts.
    ones, rank = np.ones(layout.size, np.float32), method.low_rank
    assert np.array_equal(cut_rank(layout, ones, rank), ones)
    assert not rank or not np.array_equal(cut_rank(layout, ones, rank - 1), ones)
    assert np.isfinite(bench.initial).all()
    assert open_workbench(case.ask({})).initial.tobytes() == bench.initial.tobytes()


def test_an_adapter_at_its_start_changes_nothing(case: DigitsCase) -> None:
    federation = case.federation
    examples = federation.site(federation.trained[0]).splits(case.job).test
    inputs, bench = examples.batch(np.arange(len(examples))), federation.bench
    attached = outputs(bench.model, inputs)
    with bench.model.disable_adapter():
        plain = outputs(bench.model, inputs)
    assert same(attached, plain, 1e-5)


def test_sites_compute_what_pefts_model_does(case: DigitsCase) -> None:
    """With values that are nothing like the start, one site alone and two in one pass."""
    stack, federation = open_stack(case.job), case.federation
    examples = federation.site(federation.trained[0]).splits(case.job).test
    inputs = examples.batch(np.arange(len(examples)))
    bench = stack.bench
    vectors = [bench.initial, *(noisy(bench, seed=seed) for seed in (1, 2))]
    wanted = []
    for vector in vectors:
        bench.put((bench.layout, vector))
        wanted.append(outputs(bench.model, inputs)["logits"])
    bench.put()
    with torch.inference_mode():
        for vector, theirs in zip(vectors, wanted, strict=True):
            stack.put_one(bench.layout, vector)
            ours = stack.logits(as_tensors(inputs))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
            assert theirs is wanted[0] or not torch.allclose(theirs, wanted[0], atol=1e-3)
        stack.put(bench.layout, torch.from_numpy(np.stack(vectors[1:])))
        twice = {key: torch.cat([value, value]) for key, value in as_tensors(inputs).items()}
        torch.testing.assert_close(stack.logits(twice), torch.cat(wanted[1:]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("head", get_args(HeadPolicy))
def test_the_heads_policy_is_kept(case: DigitsCase, head: str) -> None:
    if head not in heads_of(case.job.method.kind):
        with pytest.raises(JobError):
            case.ask({"method": {"head": head}})
        return
    job = case.ask({"method": {"head": head}})
    bench = open_workbench(job)
    sent = any(map(is_head, make_plan(job, bench, "").exchanged.names))
    stays = any(map(is_head, bench.local.names))
    trains = any(map(is_head, bench.layout.names))
    assert (sent, stays, trains) == (head == "shared", head == "local", head != "frozen")


def test_two_rounds_move_every_module_that_travels(case: DigitsCase) -> None:
    federation = case.federation
    run, final = federation.trained
    start = federation.bench.initial_of(federation.exchanged)
    assert distance(final, start) > 1e-3 and np.isfinite(final).all()
    assert still_modules(federation, start, final) == []
    assert [(line["sites"], line["dropped"]) for line in run.history()] == [(2, []), (2, [])]


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(case: DigitsCase) -> None:
    check_resumed(case.federation, *case.federation.trained)


def test_sites_in_one_pass_come_to_what_they_come_to_one_by_one(case: DigitsCase) -> None:
    federation = case.federation
    mask = felt(federation.exchanged)
    together, alone = federation.together, federation.trained[1]
    assert distance(together[mask], alone[mask]) < 1e-5
    assert mask.mean() > 0.9


def test_masked_is_clear(case: DigitsCase, tmp_path: Path) -> None:
    over = {"simulation": {"sites": 3}}
    jobs = case.ask(over), case.ask({**over, "privacy": MASKED})
    clear, masked = (OneRound(job, tmp_path / str(at)) for at, job in enumerate(jobs))
    assert masked.record.masked is not None and masked.record.masked["clipped"] == 0.0
    bound = masked.record.masked["error_bound"]
    assert 0 < bound < distance(clear.state.adapter, clear.start.adapter) / 10
    assert distance(masked.state.adapter, clear.state.adapter) <= bound + 1e-7
    ours, theirs = (one.count(clear.state.adapter) for one in (masked, clear))
    assert theirs.tally.examples > 0
    assert np.array_equal(ours.tally.counts, theirs.tally.counts)


def test_peft_loads_the_export_and_the_card_describes_it(case: DigitsCase) -> None:
    federation, method = case.federation, case.job.method
    run, final = federation.trained
    folder = run.folder / "adapter"
    examples = federation.site(run).splits(case.job).test
    inputs = examples.batch(np.arange(len(examples)))
    bench = federation.bench
    untrained = outputs(bench.model, inputs)
    bench.put((federation.exchanged, final))
    trained = outputs(bench.model, inputs)
    bench.put()
    assert not same(trained, untrained, 1e-3)
    attached = bench.model.peft_config["default"]
    assert PeftConfig.from_pretrained(folder).peft_type == attached.peft_type
    assert same(outputs(card_model(folder, BACKBONE), inputs), trained, 1e-5)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert method.describe().startswith(method.kind) and method.describe() in card


def test_each_refusal_is_of_a_feature_and_is_refused(case: DigitsCase) -> None:
    check_texts(case.job.method.refuses, case.job)
    check_asked(case.job.method.refuses, case.ask)
