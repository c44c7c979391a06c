"""Local training does what AdamW does to exactly the named tensors, and the same every time."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.trainings import (
    KINDS,
    book,
    digits,
    noisy,
    open_small,
    rows_for,
    settings,
    task,
    trained,
)

from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.training.evaluate import evaluate
from fedgraft.client.training.trainer import Span, Trained, train, train_alone
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import ImageExamples
from fedgraft.common.layout import Layout, Vector, is_factor_a, is_head
from fedgraft.common.metrics.evaluation import Measures


def part_of(stack: Stack, part: str) -> Layout:
    """Some of the tensors that a method would train."""
    chosen = {
        "all": lambda name: True,
        "without A": lambda name: not is_factor_a(name),
        "head": is_head,
    }[part]
    layout = stack.bench.layout
    return layout.only(name for name in layout.names if chosen(name))


def moved(stack: Stack, vector: Vector) -> Vector:
    """How far training came from its start."""
    step: Vector = vector - noisy(stack.bench)
    return step


# By the book


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 2, "batch_size": 10},  # the last batch is smaller
        {"proximal": 0.5, "epochs": 2},
        {"weight_decay": 0.3},
        {"clip_norm": 0.05, "epochs": 2},
        {"schedule": {"shape": "cosine", "warmup": 0.4, "floor": 0.1}},
        {"proximal": 0.5, "clip_norm": 0.5, "accumulation": 4, "weight_decay": 0.1},
    ],
    ids=repr,
)
def test_training_is_adamw_by_the_book(changes: dict[str, Any]) -> None:
    stack, examples, wanted = open_small("vit"), digits(), settings(**changes)
    span = Span(0.3, 0.6)
    wanted_end, loss = book(stack.bench, examples, wanted, span=span)
    result = trained(stack, examples, wanted, span=span)
    assert np.abs(moved(stack, result.vector)).max() > 1e-4
    np.testing.assert_allclose(result.vector, wanted_end, rtol=0, atol=3e-6)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.steps == wanted.epochs * math.ceil(24 / wanted.batch_size)


@pytest.mark.parametrize("part", ["all", "without A", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_trained_by_the_book(kind: str, part: str) -> None:
    stack, examples, wanted = open_small(kind), rows_for(kind, 20), settings(epochs=2)
    layout = part_of(stack, part)
    wanted_end, loss = book(stack.bench, examples, wanted, layout=layout)
    result = trained(stack, examples, wanted, layout=layout)
    assert np.abs(result.vector - noisy(stack.bench, layout)).max() > 1e-4
    np.testing.assert_allclose(result.vector, wanted_end, rtol=0, atol=3e-6)
    assert result.loss == pytest.approx(loss, abs=1e-5)


def test_every_setting_of_the_optimiser_matters() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"proximal": 0.5},
        {"weight_decay": 0.3},
        {"clip_norm": 0.05},
        {"learning_rate": 2e-3},
        {"epochs": 1},
        {"batch_size": 12},
        {"schedule": {"shape": "linear"}},
    ]
    stack, examples = open_small("vit"), digits()
    ends = [
        trained(stack, examples, settings(**{"epochs": 2, **c})).vector.tobytes() for c in changes
    ]
    assert len(set(ends)) == len(changes)


def test_accumulating_is_the_same_as_one_large_batch() -> None:
    stack, examples = open_small("vit"), digits()
    whole = trained(stack, examples, settings())
    parts = trained(stack, examples, settings(accumulation=4))
    np.testing.assert_allclose(parts.vector, whole.vector, rtol=0, atol=1e-6)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert parts.steps == whole.steps == 3


def test_a_proximal_term_holds_the_adapter_near_its_start() -> None:
    stack, examples = open_small("vit"), digits()
    far = []
    for mu in (0.0, 0.1, 1.0, 10.0):
        wanted = settings(proximal=mu, epochs=4, learning_rate=3e-3)
        end = trained(stack, examples, wanted).vector
        far.append(float(np.linalg.norm(moved(stack, end))))
    assert far[0] > far[1] > far[2] > far[3] > 0


def test_weight_decay_shrinks_towards_zero_by_rate_times_decay() -> None:
    stack, examples = open_small("vit"), digits(8)
    plain = trained(stack, examples, settings()).vector
    decayed = trained(stack, examples, settings(weight_decay=0.5)).vector
    shrunk = plain - 1e-3 * 0.5 * noisy(stack.bench)
    np.testing.assert_allclose(decayed, shrunk, rtol=0, atol=1e-7)


def test_more_epochs_may_be_asked_for_than_the_settings_say() -> None:
    stack = open_small("vit")
    mine = task(digits(), stack.bench.initial)
    result = train_alone(stack, stack.bench.layout, mine, settings=settings(epochs=1), epochs=3)
    assert result.steps == 9


# What must not change


def _state(stack: Stack) -> dict[str, torch.Tensor]:
    """Every tensor of the stack and of what it is the twin of."""
    models = {"stack": stack.model, "peft": stack.bench.model}
    found = {
        f"{which} {name}": value.clone()
        for which, model in models.items()
        for name, value in model.state_dict().items()
    }
    return found | {f"fixed {name}": value.clone() for name, value in stack.fixed.items()}


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
@pytest.mark.parametrize("part", ["all", "without A", "head"])
def test_training_writes_to_no_model(kind: str, part: str) -> None:
    stack = open_small(kind)
    layout, before = part_of(stack, part), _state(stack)
    start = noisy(stack.bench, layout)
    mine = task(rows_for(kind, 24), start.copy())
    result = train_alone(stack, layout, mine, settings=settings(epochs=2))
    after = _state(stack)
    # No buffer either: the running statistics of batch norm do not drift.
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys()
    assert (kind == "resnet") == any("running_mean" in name for name in before)
    assert mine.start.tobytes() == start.tobytes()
    # Every tensor that was named did change.
    still = [n for n, at in layout.slices.items() if np.array_equal(result.vector[at], start[at])]
    assert not still and result.vector.shape == (layout.size,)


def test_the_gradient_of_a_tensor_that_is_not_trained_is_not_computed() -> None:
    stack = open_small("vit")
    layout = part_of(stack, "head")
    trained(stack, digits(8), settings())
    trained(stack, digits(8), settings(), layout=layout)
    for name, (module, attribute) in stack.modules.items():
        assert module.values[attribute].requires_grad == (name in layout.names)


def test_a_smaller_set_of_names_after_a_larger_one_trains_only_those() -> None:
    stack = open_small("vit")
    layout = stack.bench.layout.only(stack.bench.layout.names[-1:])
    first = trained(stack, digits(8), settings(), layout=layout)
    trained(stack, digits(8), settings())
    again = trained(stack, digits(8), settings(), layout=layout)
    # The rest is at its initial values, whatever was trained before.
    assert again.vector.tobytes() == first.vector.tobytes()
    assert not np.array_equal(first.vector, noisy(stack.bench, layout))


def test_a_tensor_that_no_output_depends_on_stays_where_it_is() -> None:
    """Such as a pooler beside a head that has its own, with factors all the same."""
    stack = open_small("bert")
    layout, start = stack.bench.layout, noisy(stack.bench)
    path = "encoder.layer.2.attention.self.value"
    layer = stack.model.get_submodule(f"bert.{path}")
    handle = layer.register_forward_hook(lambda module, args, output: output.detach())
    result = trained(stack, rows_for("bert", 24), settings())
    handle.remove()
    for name, where in layout.slices.items():
        same = np.array_equal(result.vector[where], start[where])
        assert same == (path in name), name


def test_the_stack_is_in_eval_mode() -> None:
    stack = open_small("bert", dropout=0.3)
    trained(stack, rows_for("bert", 8), settings(dropout=0.3))
    assert not any(module.training for module in stack.model.modules())


def test_batch_norm_in_a_head_does_not_drift(tmp_path: Path) -> None:
    # Its statistics are no adapter tensors: they would neither travel nor be reset between sites.
    config = transformers.LevitConfig(
        image_size=32, num_channels=1, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1], key_dim=[4, 4, 4], num_labels=10,
        down_ops=[["Subsample", 4, 2, 4, 2, 2], ["Subsample", 4, 2, 4, 2, 2]],
    )  # fmt: skip
    transformers.LevitForImageClassification(config).save_pretrained(tmp_path)
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": [str(i) for i in range(10)]},
        "backbone": {"source": f"path:{tmp_path}"},
        "method": {"kind": "head"},
    }
    stack = open_stack(parse_job(raw, where="test"))
    pixels = np.random.default_rng(0).normal(size=(16, 1, 32, 32)).astype(np.float32)
    examples = ImageExamples(np.arange(16) % 10, pixels, np.arange(16))
    before = _state(stack)
    result = trained(stack, examples, settings())
    assert any("running_mean" in name for name in before)
    assert np.abs(moved(stack, result.vector)).max() > 1e-4
    other = task(examples.subset(np.arange(9)), noisy(stack.bench, seed=3), seed=3)
    pair = [task(examples, noisy(stack.bench)), other]
    one, _ = train(stack, stack.bench.layout, pair, settings=settings())
    assert isinstance(one, Trained)
    np.testing.assert_allclose(one.vector, result.vector, rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in _state(stack).items())


# Chance


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(dropout: float) -> None:
    stack, examples = open_small("vit", dropout=dropout), digits()
    wanted = settings(epochs=2, dropout=dropout)
    first = trained(stack, examples, wanted, seed=1)
    torch.manual_seed(99)  # the global generator has no say
    again = trained(stack, examples, wanted, seed=1)
    other = trained(stack, examples, wanted, seed=2)
    assert first.vector.tobytes() == again.vector.tobytes()
    assert (first.loss, first.steps) == (again.loss, again.steps)
    assert first.vector.tobytes() != other.vector.tobytes()


def test_the_global_generators_are_not_touched() -> None:
    stack = open_small("vit", dropout=0.3)
    torch.manual_seed(5)
    np.random.seed(5)
    ours, theirs = torch.get_rng_state(), copy.deepcopy(np.random.get_state())
    trained(stack, digits(), settings(dropout=0.3, group_by_length=True))
    assert torch.equal(torch.get_rng_state(), ours)
    assert repr(np.random.get_state()) == repr(theirs)


# Numbers


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_the_sites_failure(value: float) -> None:
    stack = open_small("vit")
    start = noisy(stack.bench)
    start[0] = value
    with pytest.raises(SiteFailure) as caught:
        trained(stack, digits(8), settings(), start=start)
    assert caught.value.code == "loss-not-finite"


def test_weights_that_run_away_in_the_last_step_are_the_sites_failure() -> None:
    with pytest.raises(SiteFailure) as caught:  # the loss of the only batch was still finite
        trained(open_small("vit"), digits(8), settings(learning_rate=1e39))
    assert caught.value.code == "loss-not-finite"


def test_a_failure_leaves_nothing_behind() -> None:
    stack = open_small("vit")
    before = trained(stack, digits(8), settings())
    with pytest.raises(SiteFailure):
        trained(stack, digits(8), settings(), start=np.full_like(before.vector, np.nan))
    after = trained(stack, digits(8), settings())
    assert after.vector.tobytes() == before.vector.tobytes()


def test_no_examples_are_the_sites_failure() -> None:
    with pytest.raises(SiteFailure) as caught:
        trained(open_small("vit"), digits(8).subset(np.empty(0, np.int64)), settings())
    assert caught.value.code == "no-examples"


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_bf16_computes_in_bf16_and_stays_close(kind: str) -> None:
    examples, wanted = rows_for(kind, 24), settings(epochs=2)
    stack = open_small(kind)
    full = trained(stack, examples, wanted)
    half = trained(open_small(kind, precision="bf16"), examples, wanted)
    assert half.vector.dtype == np.float32
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    step, other = moved(stack, full.vector), moved(stack, half.vector)
    assert step @ other / (np.linalg.norm(step) * np.linalg.norm(other)) > 0.8
    assert all(p.dtype == torch.float32 for p in stack.bench.model.parameters())


def test_training_on_digits_learns_them() -> None:
    stack, examples = open_small("vit"), digits(200)
    layout, initial = stack.bench.layout, stack.bench.initial
    before = evaluate(stack, layout, initial, examples, measures=Measures(10)).tally
    result = trained(stack, examples, settings(epochs=3, learning_rate=5e-3), start=initial)
    after = evaluate(stack, layout, result.vector, examples, measures=Measures(10)).tally
    assert after.mean_loss < 0.6 * before.mean_loss
    assert after.accuracy > before.accuracy
    assert after.mean_loss < result.loss < before.mean_loss
