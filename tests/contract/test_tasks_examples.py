"""Examples of any task can be cut and joined, and what it measures of them adds up."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from support.contract_tasks import TaskCase

from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.model.randomness import SiteRows
from fedgraft.client.objectives import OBJECTIVES
from fedgraft.client.training.evaluate import measure
from fedgraft.common.examples import Examples, concatenate
from fedgraft.common.metrics.evaluation import Evaluation
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.seeds import numpy_generator


def examples_of(case: TaskCase, site: str = "ash") -> Examples:
    path = case.folder / "sites" / site / "train" / "rows.jsonl"
    dataset = read_split(str(path), case.job).dataset
    return encode(dataset, case.federation.bench.processor, case.job, store=None, key="")


def batch_of(examples: Examples, index: Any, width: int) -> dict[str, Any]:
    """Inputs and targets."""
    return {**examples.batch(index, width), "": examples.targets(index, width)}


def check_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


def test_examples_are_cut_and_joined(case: TaskCase) -> None:
    ours, theirs = examples_of(case), examples_of(case, "beech")
    count, width = len(ours), max(ours.longest, theirs.longest)
    assert count and ours.nbytes > 0 and ours.labels.shape == (count,)
    every, chosen = np.arange(count), np.array([3, 0, 2])
    whole = batch_of(ours, every, width)
    assert {len(values) for values in whole.values()} == {count}
    check_equal(
        batch_of(ours.subset(chosen), np.arange(3), width),
        {name: values[chosen] for name, values in whole.items()},
    )
    beside = batch_of(theirs, np.arange(len(theirs)), width)
    check_equal(
        batch_of(concatenate([ours, theirs]), np.arange(count + len(theirs)), width),
        {name: np.concatenate([values, beside[name]]) for name, values in whole.items()},
    )
    assert ours.digest == examples_of(case).digest
    assert ours.subset(every[::-1]).digest != ours.digest != theirs.digest


def test_a_blank_example_is_what_the_model_reads(case: TaskCase) -> None:
    """Costs are measured with it: no input is missing, none is too many."""
    examples = examples_of(case)
    real = examples.batch(np.arange(1), examples.longest)
    blank = case.task.blank(case.federation.bench.processor, case.job.settings)
    assert blank.keys() == real.keys()
    assert {name: value.dtype for name, value in blank.items()} == {
        name: value.dtype for name, value in real.items()
    }


def test_what_is_varied_keeps_its_shape(case: TaskCase) -> None:
    examples = examples_of(case)
    corrupt = case.task.corruption(examples)
    if corrupt is None:
        return
    index = np.arange(len(examples))
    width = examples.width(index)
    before = examples.batch(index, width), examples.targets(index, width)

    def draw(seed: int) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(seed)
        rows = SiteRows(len(index), width, examples.pad_left, generator)
        return corrupt(*before, rows)

    found = [draw(seed) for seed in (1, 1, 2)]
    for inputs, targets in found:
        for name, values in (*before[0].items(), ("", before[1])):
            varied = targets if name == "" else inputs[name]
            assert (varied.shape, varied.dtype) == (values.shape, values.dtype), name
    (first, wanted), (again, repeated), (other, _) = found
    check_equal({**first, "": wanted}, {**again, "": repeated})
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    check_equal(
        {**before[0], "": before[1]},
        {**examples.batch(index, width), "": examples.targets(index, width)},
    )


def evaluation_of(case: TaskCase, examples: Examples, *, noise: int | None = None) -> Evaluation:
    bench = case.federation.bench
    vector = bench.initial
    if noise is not None:
        drawn = np.random.default_rng(noise).normal(0, 0.1, bench.layout.size)
        vector = (vector + drawn).astype(np.float32)
    stack = open_stack(case.job)
    return measure(stack, bench.layout, vector, examples, measures=case.job.measures)


def test_what_is_measured_adds_up(case: TaskCase) -> None:
    measures = case.job.measures
    ours, theirs = (
        evaluation_of(case, examples_of(case, site), noise=1) for site in ("ash", "beech")
    )
    for one in (ours.tally, ours.tally + theirs.tally, Tally.empty(measures)):
        assert measures.fits(one)
        again = Tally.from_vector(one.to_vector(), measures)
        assert np.array_equal(again.counts, one.counts) and again.loss == one.loss
    both = ours.joined([theirs])
    summed, pooled = (measures.figures(one) for one in (ours.tally + theirs.tally, both.tally))
    assert summed.keys() == pooled.keys()
    for key, value in summed.items():
        if not isinstance(value, dict):
            assert value == pytest.approx(pooled[key], rel=1e-3, abs=1e-3), key
    kept = measures.evaluation(json.loads(json.dumps(both.to_json())))
    assert np.array_equal(kept.tally.counts, both.tally.counts)
    assert kept.tally.loss == pytest.approx(both.tally.loss)
    alone = examples_of(case)
    order = np.arange(len(alone))[::-1]
    turned = evaluation_of(case, alone.subset(order), noise=1)
    assert np.array_equal(turned.tally.counts, ours.tally.counts)


def test_an_example_is_measured_alike_alone_and_in_a_batch(case: TaskCase) -> None:
    examples, measures = examples_of(case), case.job.measures
    whole = evaluation_of(case, examples, noise=1)
    first, *others = (
        evaluation_of(case, examples.subset(np.array([at])), noise=1) for at in order_of(examples)
    )
    single, batch = (measures.figures(one.tally) for one in (first.joined(others), whole))
    for key, value in batch.items():
        if not isinstance(value, dict):
            assert single[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key


def order_of(examples: Examples) -> list[int]:
    """All examples, in another order than that of a batch."""
    order = np.random.default_rng(0).permutation(len(examples))
    return [int(at) for at in order]


def test_models_are_held_against_each_other(case: TaskCase) -> None:
    examples = examples_of(case)
    ours, theirs = (evaluation_of(case, examples, noise=noise) for noise in (1, 2))
    found = ours.intervals(numpy_generator(0, "test"))
    assert {f"{metric.key}_interval" for metric in case.task.metrics} <= found.keys()
    for low, high in found.values():
        assert low <= high
    for other in (ours, theirs):
        for rival in ("local_only", "zero_shot"):
            judged = ours.compare(other, numpy_generator(0, "test"), name="ash", rival=rival)
            assert judged["outcome"] in ("helped", "hurt", "unclear")
            assert judged["sentence"] and (rival == "zero_shot" or "ash" in judged["sentence"])
            json.dumps(judged, allow_nan=False)
            if other is ours:
                assert judged["outcome"] == "unclear" and judged["difference"] == 0


def test_a_site_weighs_the_targets_of_its_examples(case: TaskCase) -> None:
    """Its weight is the divisor of its loss, also in a part of its examples."""
    objective, stack = OBJECTIVES[case.task.target], open_stack(case.job)
    whole = examples_of(case)
    stack.put_one(stack.bench.layout, stack.bench.initial)
    for examples in (whole, whole.subset(np.array([2, 0])), whole.joined([whole])):
        index = np.arange(len(examples))
        inputs = {k: torch.from_numpy(v) for k, v in examples.batch(index).items()}
        with torch.inference_mode():
            predicted = stack.logits(inputs)
        losses = objective.losses(predicted, torch.from_numpy(examples.targets(index)))
        assert examples.target_count == losses.targets.sum() > 0


def test_a_task_that_takes_a_teacher_can_be_taught(case: TaskCase) -> None:
    """A teacher gives one row of logits an example; who cannot use it refuses distillation."""
    stack, examples = open_stack(case.job), examples_of(case)
    inputs = {k: torch.from_numpy(v) for k, v in examples.batch(np.arange(4)).items()}
    stack.put_one(stack.bench.layout, stack.bench.initial)
    with torch.inference_mode():
        predicted = stack.logits(inputs)
    fits = case.task.labelled and predicted.shape == (4, len(case.job.job.labels))
    assert fits == ("distillation" not in case.task.refuses)


def test_the_objective_trains_on_what_it_counts(case: TaskCase) -> None:
    objective, stack = OBJECTIVES[case.task.target], open_stack(case.job)
    examples = examples_of(case)
    index = np.arange(4)
    inputs = {k: torch.from_numpy(v) for k, v in examples.batch(index).items()}
    targets = torch.from_numpy(examples.targets(index))
    stack.put_one(stack.bench.layout, stack.bench.initial)
    with torch.inference_mode():
        predicted = stack.logits(inputs)
        losses = objective.losses(predicted, targets)
        collector = case.job.measures.collect(examples.subset(index))
        collector.add(index, objective.counts(predicted, targets))
    summed, counted = losses
    assert summed.shape == counted.shape == (4,)
    assert bool(summed.isfinite().all()) and float(summed.min()) >= 0
    # A batch has the loss that is reported of it, in the same unit: training minimises that.
    tally = collector.evaluation().tally
    assert float(summed.sum() / counted.sum()) == pytest.approx(tally.mean_loss, rel=1e-4)
    assert objective.at_once(case.task.outputs(stack.model.config), examples.longest) >= 1
