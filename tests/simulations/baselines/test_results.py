"""Thousands of sites' results: small in memory and on disk, and the numbers they always were."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.common.metrics.intervals import macro_f1_interval, wilson_interval
from fedgraft.common.metrics.label_evaluation import LabelEvaluation, verdict
from fedgraft.common.metrics.measures import LabelMeasures
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.tasks import TASKS
from fedgraft.simulations.baselines.compare import Measured
from fedgraft.simulations.baselines.results import (
    final_metrics,
    load_measured,
    save_measured,
    site_results,
)
from fedgraft.simulations.data.partition import SimulatedSite

TASK = TASKS["image-classification"]


def evaluations(
    sites: int, *, classes: int, seed: int, examples: int = 20
) -> list[LabelEvaluation | None]:
    draw = np.random.default_rng(seed)
    found: list[LabelEvaluation | None] = []
    for _ in range(sites):
        true = draw.integers(0, classes, examples)
        predicted = np.where(draw.random(examples) < 0.6, true, draw.integers(0, classes, examples))
        found.append(LabelEvaluation(float(draw.random()), true, predicted, classes))
    return found


def site(number: int) -> SimulatedSite:
    return SimulatedSite(f"site-{number:02}", 60, 20, (30, 30, 0), "")


def tallied(one: LabelEvaluation) -> Tally:
    confusion = np.zeros((one.classes, one.classes), np.int64)
    for true, predicted in zip(one.true, one.predicted, strict=True):
        confusion[true, predicted] += 1
    return Tally(one.loss, confusion)


def metrics(tally: Tally, *purpose: str) -> dict[str, Any]:
    draws = numpy_generator(3, "bootstrap", *purpose)
    return {
        **tally.summary(),
        "accuracy_interval": list(wilson_interval(tally.correct, tally.examples)),
        "macro_f1_interval": list(macro_f1_interval(tally.confusion, draws)),
    }


def test_every_site_and_model_has_its_own_figures() -> None:
    federated = evaluations(30, classes=6, seed=1)
    alone = evaluations(30, classes=6, seed=2)
    alone[4] = None
    measured = {"federated": Measured(tuple(federated)), "local_only": Measured(tuple(alone), ())}
    sites = [site(number) for number in range(30)]
    results = site_results(sites, measured, 3, LabelMeasures(6), TASK)
    for number, found in enumerate(results):
        ours, own = federated[number], alone[number]
        assert ours is not None
        assert found["federated"] == metrics(tallied(ours), f"site-{number:02}", "federated")
        assert found["classes"] == 2
        if own is None:
            assert (found["local_only"], found["outcome"]) == (None, "unknown")
            continue
        assert found["local_only"] == metrics(tallied(own), f"site-{number:02}", "local_only")
        right = (ours.true == ours.predicted, own.true == own.predicted)
        assert found["verdict"] == verdict(*right, name=found["name"]).sentence


@pytest.mark.parametrize(("first", "said"), [(0, ""), (1, "macro F1 ")])
def test_after_a_fine_tune_only_accuracy_goes_without_its_name(first: int, said: str) -> None:
    names = ("federated", "local_only", "federated_tuned")
    own = {
        name: Measured(tuple(evaluations(1, classes=3, seed=at))) for at, name in enumerate(names)
    }
    task = copy.copy(TASK)
    task.metrics = (TASK.metrics[first], TASK.metrics[1 - first])
    (found,) = site_results([site(0)], own, 3, LabelMeasures(3), task)
    figure = task.metrics[0].text(found["federated_tuned"][task.metrics[0].key])
    assert found["verdict"].endswith(f"After a short fine-tune there: {said}{figure}.")


def test_one_model_is_pooled_by_adding_its_sites_up() -> None:
    found = evaluations(12, classes=6, seed=1)
    found[3] = None
    total = Tally.empty(LabelMeasures(6))
    for one in found:
        total += tallied(one) if one else Tally.empty(LabelMeasures(6))
    final = final_metrics({"federated": Measured(tuple(found))}, 3, LabelMeasures(6), TASK)
    assert final["federated"] == metrics(total, "pooled", "federated")
    assert final["central"] is None


def test_models_of_their_own_are_averaged() -> None:
    summaries = ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.75, "loss": 2.0})
    final = final_metrics({"local_only": Measured((), summaries)}, 3, LabelMeasures(6), TASK)
    assert final["local_only"] == {"accuracy": 0.625, "loss": 1.5, "best_accuracy": 0.75}


@pytest.mark.parametrize(
    "measured",
    [
        None,
        Measured(()),
        Measured((None, None)),
        Measured((), ()),
        Measured(tuple(evaluations(3, classes=6, seed=0, examples=0))),
    ],
)
def test_what_was_not_measured_has_no_figures(measured: Measured | None) -> None:
    assert final_metrics({"federated": measured}, 3, LabelMeasures(6), TASK)["federated"] is None


@pytest.mark.parametrize("models", [None, (), ({"accuracy": 0.1 + 0.2, "loss": 1 / 3},)])
def test_what_was_kept_is_read_back_to_the_last_bit(
    tmp_path: Path, models: tuple[dict[str, float], ...] | None
) -> None:
    own = [*evaluations(5, classes=6, seed=1), None, *evaluations(1, classes=6, seed=2, examples=0)]
    save_measured(tmp_path / "kept.json", Measured(tuple(own), models))
    back = load_measured(tmp_path / "kept.json", LabelMeasures(6))
    assert back is not None and back.models == models and len(back.own) == 7
    for before, after in zip(own, back.own, strict=True):
        if before is None or after is None:
            assert before is after
            continue
        assert isinstance(after, LabelEvaluation)
        assert (after.loss, after.classes) == (before.loss, before.classes)
        assert after.true.dtype == after.predicted.dtype == np.int64
        assert np.array_equal(after.tally.confusion, tallied(before).confusion)
        assert np.array_equal(after.correct, before.true == before.predicted)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_a_comparison_that_means_nothing_is_kept_as_that(tmp_path: Path) -> None:
    save_measured(tmp_path / "kept.json", None)
    assert load_measured(tmp_path / "kept.json", LabelMeasures(6)) is None


def test_many_classes_cost_a_site_neither_memory_nor_disk(tmp_path: Path) -> None:
    # A dense matrix of 150 classes is 180 kB a site, 45 kB as text.
    measured = Measured(tuple(evaluations(50, classes=150, seed=1)))
    assert len(pickle.dumps(measured)) < 50 * 1500
    save_measured(tmp_path / "kept.json", measured)
    assert (tmp_path / "kept.json").stat().st_size < 50 * 400


def test_an_evaluation_does_not_hold_on_to_a_sites_data() -> None:
    from support.evaluations import measured_labels
    from support.federations import digits_job

    from fedgraft.client.model.batched_model import open_stack
    from fedgraft.common.examples import ImageExamples

    stack = open_stack(digits_job())
    bench = stack.bench
    images = ImageExamples(np.arange(4), np.zeros((4, 1, 8, 8), np.float32), np.arange(4))
    window = replace(images, labels=np.arange(1000)[:4])
    found = measured_labels(stack, bench.layout, bench.initial, window, LabelMeasures(10))
    assert found.true.tolist() == [0, 1, 2, 3] and found.true.base is None
