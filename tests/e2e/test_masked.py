"""Secure aggregation end to end: the sum it should be, resumed as it should be, and no leak."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.federations import adapter_of
from support.masked_federations import SESSION, Consortium, MaskedRun, make_job
from support.masked_talk import Talk
from support.matrix import thinned

from fedgraft.common.secagg.quantize import error_bound, mean
from fedgraft.server.protocol.clear import evaluate_clear
from fedgraft.server.protocol.masked import evaluate_masked
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import RoundRecord

# The same as in clear


@pytest.mark.parametrize(
    ("rule", "head", "weights"),
    thinned(itertools.product(("fedavg", "ffa"), ("shared", "local"), ("examples", "uniform")), 3),
)
def test_a_masked_round_is_the_clear_one_within_the_stated_bound(
    tmp_path: Path, rule: str, head: str, weights: str
) -> None:
    settings: dict[str, Any] = {
        "validation": 0.25,
        "method": {"head": head},
        "aggregation": {"rule": rule, "weights": weights},
    }
    masked = Consortium(tmp_path / "masked", make_job(**settings))
    clear = Consortium(tmp_path / "clear", make_job(**settings, masked=False))
    state, record, _ = masked.run_round()
    wanted, told, _ = clear.run_round()
    assert record.masked is not None and told.masked is None
    assert record.masked["clipped"] == 0.0
    bound = record.masked["error_bound"]
    assert 0 < bound < 3e-6 < np.abs(wanted.adapter - clear.start.adapter).max()
    assert np.abs(state.adapter - wanted.adapter).max() <= bound + 1e-7
    assert (record.sites, record.dropped) == (told.sites, ())
    if weights == "examples":
        assert record.examples == told.examples
        assert record.train_loss == pytest.approx(told.train_loss, abs=1e-5)
    else:  # nobody counts examples, so the loss is the mean over sites
        losses = [masked.trained(name).loss for name in masked.names]
        assert record.examples is None
        assert record.train_loss == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("head", ["shared", "local"])
def test_masked_validation_counts_exactly_what_clear_validation_counts(
    tmp_path: Path, head: str
) -> None:
    settings: dict[str, Any] = {"validation": 0.4, "method": {"head": head}}
    masked = Consortium(tmp_path / "masked", make_job(**settings))
    clear = Consortium(tmp_path / "clear", make_job(**settings, masked=False))
    assert masked.plan.masking is not None
    found = evaluate_masked(
        masked.plan.masking,
        masked.job,
        masked.transport(masked.grid()),
        masked.names,
        masked.evaluating(),
    )
    wanted = evaluate_clear(
        clear.job,
        clear.transport(clear.grid()),
        clear.names,
        clear.evaluating(),
        clear.plan.exchanged,
    )
    assert wanted.tally.examples > 15
    assert found.tally.confusion.tolist() == wanted.tally.confusion.tolist()
    # In one lane of the metrics a level would be 4.9e-4: the loss needs its fine part, too.
    assert abs(found.tally.loss - wanted.tally.loss) <= 1e-6


def test_four_sites_give_their_sum_and_forget_the_round(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=4)
    talk = Talk(consortium)
    total = talk.finish()
    assert total.weight == sum(consortium.trained(name).examples for name in consortium.names)
    found = mean(total.sums, total.weight, talk.parameters.coding)
    bound = error_bound(4, total.weight, talk.parameters.coding)
    wanted = consortium.mean_of(consortium.names) - consortium.start.adapter
    assert np.abs(found - wanted).max() <= bound + 1e-7
    for name, node in talk.nodes.items():
        assert node.memory is None
        claims = consortium.folder / name / SESSION / "claims"
        assert claims.read_text() == "1 KEYS\n1 SHARES\n1 TRAIN\n1 CONFIRM\n1 UNMASK\n"


def test_a_site_that_holds_nothing_out_counts_nothing(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(validation=0.0), sites=3)
    total = Talk(consortium, consortium.evaluating()).finish()
    assert not total.sums.any() and total.metrics[0] == 0.0


def test_uniform_weights_hide_how_many_examples_there_are(tmp_path: Path) -> None:
    job = make_job(aggregation={"weights": "uniform"})
    assert Talk(Consortium(tmp_path, job, sites=3)).finish().weight == 3


# A run


@pytest.mark.parametrize("head", thinned(["local", "shared"], 2))
def test_the_adapter_depends_neither_on_keys_nor_on_workers(tmp_path: Path, head: str) -> None:
    settings = {"validation": 0.25, "method": {"head": head}}
    first, again, forked = (MaskedRun.create(tmp_path, settings, sites=4) for _ in range(3))
    truth = first.go()
    assert again.go().tobytes() == truth.tobytes()
    assert forked.go(workers=2).tobytes() == truth.tobytes()
    assert first.facts == again.facts == forked.facts
    assert set(first.consortium.known.sites.values()).isdisjoint(
        again.consortium.known.sites.values()
    )


@pytest.mark.parametrize("durable", [True, False], ids=["after the commit", "before the commit"])
def test_a_run_that_was_stopped_resumes_to_the_same_bytes(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"validation": 0.25, "method": {"head": "local"}, "count": 3}
    settings["aggregation"] = {"server_optimizer": {"kind": "adam", "learning_rate": 0.01}}
    whole = MaskedRun.create(tmp_path, settings, sites=4)
    truth = whole.go()
    assert whole.numbers == [1, 2, 3, 4, 5, 6]  # training and validation of each round
    stopped = MaskedRun.create(tmp_path, settings, sites=4)
    if durable:
        with pytest.raises(KeyboardInterrupt):
            stopped.go(stop_after=1)
    else:
        commit = Run.commit

        def crash(run: Run, state: Any, record: RoundRecord, layout: Any) -> None:
            if record.round == 2:
                raise KeyboardInterrupt
            commit(run, state, record, layout)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "commit", crash)
            stopped.go()
    assert stopped.go().tobytes() == truth.tobytes()
    assert np.array_equal(adapter_of(stopped.run), adapter_of(whole.run))
    assert stopped.facts == whole.facts
    assert stopped.numbers == list(range(1, 7 if durable else 9))
    assert (stopped.run.folder / "masked_rounds").read_text() == f"{stopped.numbers[-1]}\n"
