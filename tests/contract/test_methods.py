"""What every method must do: train some parameters, and export them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig
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
from support.trainings import felt

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.layout import is_head
from fedgraft.common.methods import METHODS


def settings_of(kind: str) -> dict[str, Any]:
    """The section with what it has no default for."""
    return {"kind": kind, "head": "shared"}


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
    factors = any(".lora_A." in name for name in layout.names)
    assert factors == bool(method.low_rank)
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


def test_two_rounds_move_the_adapter(case: DigitsCase) -> None:
    federation = case.federation
    run, final = federation.trained
    start = federation.bench.initial_of(federation.exchanged)
    assert distance(final, start) > 1e-3 and np.isfinite(final).all()
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
    assert PeftConfig.from_pretrained(folder).peft_type == "LORA"
    assert same(outputs(card_model(folder, BACKBONE), inputs), trained, 1e-5)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert method.describe().startswith(method.kind) and method.describe() in card


def test_each_refusal_is_of_a_feature_and_is_refused(case: DigitsCase) -> None:
    check_texts(case.job.method.refuses, case.job)
    check_asked(case.job.method.refuses, case.ask)
