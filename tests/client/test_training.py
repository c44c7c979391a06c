"""Local training does what AdamW does to exactly the named tensors, and the same every time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models

from fedgraft.client.evaluation import evaluate
from fedgraft.client.examples import Examples, ImageExamples, TextExamples
from fedgraft.client.training import Span, TrainingResult, _Dropout, learning_rate, train
from fedgraft.common.adapters import Vector, is_factor_a, is_head, read
from fedgraft.common.errors import SiteFailure
from fedgraft.common.job import Schedule, Training
from fedgraft.common.jobfile import parse_job
from fedgraft.common.workbench import Workbench, open_workbench

PEAK = 0.02


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The schedule


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        (Schedule(shape="constant"), 0.0, 1.0),
        (Schedule(shape="constant"), 0.99, 1.0),
        (Schedule(shape="linear"), 0.0, 1.0),
        (Schedule(shape="linear"), 0.25, 0.75),
        (Schedule(shape="linear"), 1.0, 0.0),
        (Schedule(shape="cosine"), 0.0, 1.0),
        (Schedule(shape="cosine"), 1 / 3, 0.75),
        (Schedule(shape="cosine"), 0.5, 0.5),
        (Schedule(shape="cosine"), 1.0, 0.0),
        (Schedule(shape="linear", floor=0.2), 0.5, 0.6),
        (Schedule(shape="linear", floor=0.2), 1.0, 0.2),
        (Schedule(shape="cosine", floor=0.1), 1.0, 0.1),
        (Schedule(shape="constant", warmup=0.2), 0.1, 0.5),
        (Schedule(shape="constant", warmup=0.2), 0.2, 1.0),
        (Schedule(shape="constant", warmup=0.2), 0.0, 0.01),  # a first step of zero is lost
        (Schedule(shape="linear", warmup=0.2), 0.2, 1.0),
        (Schedule(shape="linear", warmup=0.2), 0.6, 0.5),
        (Schedule(shape="linear", warmup=0.2), 1.0, 0.0),
    ],
)
def test_the_rate_follows_the_schedule(schedule: Schedule, progress: float, share: float) -> None:
    assert learning_rate(PEAK, schedule, progress) == pytest.approx(PEAK * share, abs=1e-15)


schedules = st.builds(
    Schedule,
    shape=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
)


@given(schedules, st.floats(0, 1), st.floats(0, 1))
def test_the_rate_rises_to_the_peak_and_then_falls_to_the_floor(
    schedule: Schedule, one: float, other: float
) -> None:
    early, late = sorted((one, other))
    first, second = (learning_rate(PEAK, schedule, at) for at in (early, late))
    slack = 1e-12 * PEAK
    assert 0 <= first <= PEAK + slack and 0 <= second <= PEAK + slack
    if late < schedule.warmup:
        assert first <= second + slack
    if early >= schedule.warmup:
        assert second <= first + slack
        assert second >= schedule.floor * PEAK - slack


# What to train

LORA = {"kind": "lora", "rank": 2, "targets": ["q_proj", "v_proj"], "head": "shared"}


def vit(**method: Any) -> Workbench:
    """The built-in vision transformer with its factors B no longer zero."""
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": [str(i) for i in range(10)]},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {**LORA, **method},
    }
    return open_workbench(parse_job(raw, where="test"))


def digits(count: int = 24) -> ImageExamples:
    """Real digits, standardised one by one as the backbone wants them."""
    bunch = load_digits()
    pixels = (bunch.images[:count] / 16).astype(np.float32)[:, None]
    mean, std = pixels.mean((1, 2, 3), keepdims=True), pixels.std((1, 2, 3), keepdims=True)
    every = np.arange(count, dtype=np.int64)
    return ImageExamples(
        bunch.target[:count].astype(np.int64), (pixels - mean) / (std + 0.05), every
    )


def noisy(bench: Workbench, scale: float = 0.05) -> Vector:
    noise = np.random.default_rng(8).normal(0, scale, bench.layout.size)
    return (bench.initial + noise).astype(np.float32)


def settings(**changes: Any) -> Training:
    plain = {"batch_size": 8, "learning_rate": 1e-3, "schedule": {"shape": "constant"}}
    return Training.model_validate({"clip_norm": 0, **plain, **changes})


def trained(
    bench: Workbench,
    examples: Examples,
    wanted: Training,
    *,
    names: tuple[str, ...] | None = None,
    seed: int = 1,
    span: Span | None = None,
    start: Vector | None = None,
) -> tuple[Vector, TrainingResult]:
    bench.put((bench.layout, noisy(bench) if start is None else start))
    result = train(
        bench.model,
        names or bench.layout.names,
        examples,
        settings=wanted,
        generator=torch.Generator().manual_seed(seed),
        span=span,
    )
    return read(bench.model, bench.layout), result


def slowly_trained(
    bench: Workbench, examples: Examples, wanted: Training, span: Span, seed: int = 1
) -> tuple[Vector, float]:
    """The same by the book: a tensor at a time, stock AdamW, one whole batch a step."""
    bench.put((bench.layout, noisy(bench)))
    model = bench.model.eval()
    pairs = [(n, p) for n, p in model.named_parameters() if n in bench.layout.slices]
    for _, parameter in pairs:
        parameter.requires_grad_(True)
    starts = [p.detach().clone() for _, p in pairs]
    optimizer = torch.optim.AdamW(
        [p for _, p in pairs], weight_decay=wanted.weight_decay, foreach=False, fused=False
    )
    draw, step, total = torch.Generator().manual_seed(seed), 0, 0.0
    steps = wanted.epochs * math.ceil(len(examples) / wanted.batch_size)
    labels = torch.from_numpy(examples.labels)
    for _ in range(wanted.epochs):
        for batch in torch.split(torch.randperm(len(examples), generator=draw), wanted.batch_size):
            model.zero_grad()
            logits = model(**examples.batch(batch.numpy())).logits
            loss = torch.nn.functional.cross_entropy(logits, labels[batch])
            torch.autograd.backward(loss)
            total += float(loss.detach()) * len(batch)
            gradients = [p.grad for _, p in pairs]
            for (_, parameter), gradient, start in zip(pairs, gradients, starts, strict=True):
                gradient += wanted.proximal * (parameter.detach() - start)
            if wanted.clip_norm:
                norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
                for gradient in gradients:
                    gradient *= min(1.0, wanted.clip_norm / norm)
            at = span.start + (span.end - span.start) * step / steps
            optimizer.param_groups[0]["lr"] = learning_rate(
                wanted.learning_rate, wanted.schedule, at
            )
            optimizer.step()
            step += 1
    return read(model, bench.layout), total / (len(examples) * wanted.epochs)


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
    bench, examples, wanted = vit(), digits(), settings(**changes)
    span = Span(0.3, 0.6)
    book, loss = slowly_trained(bench, examples, wanted, span)
    ours, result = trained(bench, examples, wanted, span=span)
    assert np.abs(ours - noisy(bench)).max() > 1e-4
    np.testing.assert_allclose(ours, book, rtol=0, atol=3e-6)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.steps == wanted.epochs * math.ceil(24 / wanted.batch_size)


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
    bench, examples = vit(), digits()
    ends = [trained(bench, examples, settings(**{"epochs": 2, **c}))[0].tobytes() for c in changes]
    assert len(set(ends)) == len(changes)


def test_accumulating_is_the_same_as_one_large_batch() -> None:
    bench, examples = vit(), digits()
    whole, result = trained(bench, examples, settings())
    parts, in_parts = trained(bench, examples, settings(accumulation=4))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
    assert in_parts.loss == pytest.approx(result.loss, abs=1e-6)
    assert in_parts.steps == result.steps == 3


def test_a_proximal_term_holds_the_adapter_near_its_start() -> None:
    bench, examples = vit(), digits()
    moved = []
    for mu in (0.0, 0.1, 1.0, 10.0):
        end, _ = trained(bench, examples, settings(proximal=mu, epochs=4, learning_rate=3e-3))
        moved.append(float(np.linalg.norm(end - noisy(bench))))
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0


def test_weight_decay_shrinks_towards_zero_by_rate_times_decay() -> None:
    bench, examples = vit(), digits(8)
    plain, _ = trained(bench, examples, settings())
    decayed, _ = trained(bench, examples, settings(weight_decay=0.5))
    np.testing.assert_allclose(decayed, plain - 1e-3 * 0.5 * noisy(bench), rtol=0, atol=1e-7)


def test_more_epochs_may_be_asked_for_than_the_settings_say() -> None:
    bench = vit()
    draw = torch.Generator().manual_seed(1)
    bench.put()
    wanted = settings(epochs=1)
    result = train(
        bench.model, bench.layout.names, digits(), settings=wanted, generator=draw, epochs=3
    )
    assert result.steps == 9


# What must not change


def _state(bench: Workbench) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in bench.model.state_dict().items()}


def resnet(folder: Path) -> Workbench:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    torch.manual_seed(2)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": [str(i) for i in range(10)]},
        "backbone": {"source": f"path:{folder}"},
        "method": {"kind": "lora", "rank": 2, "targets": "all-conv", "head": "shared"},
    }
    return open_workbench(parse_job(raw, where="test"))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("part", ["all", "without A", "head"])
def test_only_the_named_tensors_change(kind: str, part: str, tmp_path: Path) -> None:
    bench = vit() if kind == "vit" else resnet(tmp_path)
    chosen = {
        "all": lambda name: True,
        "without A": lambda name: not is_factor_a(name),
        "head": is_head,
    }[part]
    names = tuple(name for name in bench.layout.names if chosen(name))
    bench.put((bench.layout, noisy(bench)))
    before = _state(bench)
    trained(bench, digits(), settings(epochs=2), names=names)
    after = _state(bench)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Parameters only, and no buffer: the running statistics of batch norm do not drift.
    assert changed == set(names)
    assert (kind == "resnet") == any("running_mean" in name for name in before)


def test_a_smaller_set_of_names_after_a_larger_one_trains_only_those() -> None:
    bench = vit()
    trained(bench, digits(8), settings())
    start = noisy(bench)
    end, _ = trained(bench, digits(8), settings(), names=bench.layout.names[-1:], start=start)
    where = bench.layout.slices[bench.layout.names[-1]]
    assert np.array_equal(np.delete(end, where), np.delete(start, where))
    assert not np.array_equal(end[where], start[where])


# Chance


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(dropout: float) -> None:
    bench, examples, wanted = vit(dropout=dropout), digits(), settings(epochs=2, dropout=dropout)
    first, result = trained(bench, examples, wanted, seed=1)
    torch.manual_seed(99)  # the global generator has no say
    again, repeated = trained(bench, examples, wanted, seed=1)
    other, _ = trained(bench, examples, wanted, seed=2)
    assert first.tobytes() == again.tobytes()
    assert result == repeated
    assert first.tobytes() != other.tobytes()


def test_the_global_generators_are_not_touched() -> None:
    bench = vit(dropout=0.3)
    torch.manual_seed(5)
    np.random.seed(5)
    ours, theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    trained(bench, digits(), settings(dropout=0.3))
    assert torch.equal(torch.get_rng_state(), ours)
    assert np.array_equal(np.random.get_state()[1], theirs)  # type: ignore[index]


STILL = 1e-12  # a learning rate at which nothing moves


def _losses(bench: Workbench, examples: Examples, wanted: Training) -> tuple[float, float]:
    """The mean loss as training saw it and as evaluation measures it afterwards."""
    _, result = trained(bench, examples, wanted)
    measured = evaluate(bench.model, examples, classes=10)
    again = evaluate(bench.model, examples, classes=10)
    assert measured.tally.loss == again.tally.loss
    return result.loss, measured.tally.mean_loss


def test_dropout_acts_on_the_low_rank_path_in_training_only() -> None:
    still = settings(learning_rate=STILL)
    seen, measured = _losses(vit(dropout=0.0), digits(), still)
    assert seen == pytest.approx(measured, abs=1e-5)
    dropped, after = _losses(vit(dropout=0.5), digits(), still)
    assert abs(dropped - after) > 1e-3
    assert after == pytest.approx(measured, abs=1e-5)  # evaluation is as if there were none


def bert(folder: Path) -> Workbench:
    """A text model whose config asks for dropout everywhere."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=10, initializer_range=0.5,
        hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4, classifier_dropout=0.4,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    raw = {
        "job": {"name": "t", "task": "text-classification", "labels": [str(i) for i in range(10)]},
        "backbone": {"source": f"path:{folder}"},
        "method": {"kind": "lora", "rank": 2, "targets": ["query"], "head": "shared"},
        "data": {"max_length": 8},
    }
    return open_workbench(parse_job(raw, where="test"))


def texts(count: int = 24) -> TextExamples:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 8, count)
    return TextExamples(
        labels=draw.integers(0, 10, count),
        ids=draw.integers(2, 20, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=None,
        pad_id=0,
        pad_left=False,
    )


def test_dropout_in_the_head_is_the_jobs_and_the_backbone_has_none(tmp_path: Path) -> None:
    bench = bert(tmp_path)
    seen, measured = _losses(bench, texts(), settings(learning_rate=STILL, dropout=0.0))
    assert seen == pytest.approx(measured, abs=1e-4)
    dropped, after = _losses(bench, texts(), settings(learning_rate=STILL, dropout=0.5))
    assert abs(dropped - after) > 1e-3
    assert after == pytest.approx(measured, abs=1e-5)
    # And off again: the one before left nothing behind.
    seen, _ = _losses(bench, texts(), settings(learning_rate=STILL, dropout=0.0))
    assert seen == pytest.approx(measured, abs=1e-4)


def test_dropout_keeps_the_mean() -> None:
    dropout = _Dropout(0.25, torch.Generator().manual_seed(1)).train()
    out = dropout(torch.ones(100_000))
    assert sorted(set(out.tolist())) == [0.0, pytest.approx(4 / 3)]
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert dropout.eval()(torch.ones(5)).tolist() == [1] * 5


# Numbers


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_the_sites_failure(value: float) -> None:
    bench = vit()
    start = noisy(bench)
    start[0] = value
    with pytest.raises(SiteFailure) as caught:
        trained(bench, digits(8), settings(), start=start)
    assert caught.value.code == "loss-not-finite"


def test_weights_that_run_away_in_the_last_step_are_the_sites_failure() -> None:
    with pytest.raises(SiteFailure) as caught:  # the loss of the only batch was still finite
        trained(vit(), digits(8), settings(learning_rate=1e39))
    assert caught.value.code == "loss-not-finite"


def test_a_failure_leaves_nothing_behind() -> None:
    bench = vit()
    before, _ = trained(bench, digits(8), settings())
    with pytest.raises(SiteFailure):
        trained(bench, digits(8), settings(), start=np.full(bench.layout.size, np.nan, np.float32))
    after, _ = trained(bench, digits(8), settings())
    assert after.tobytes() == before.tobytes()


def test_no_examples_are_the_sites_failure() -> None:
    with pytest.raises(SiteFailure) as caught:
        trained(vit(), digits(8).subset(np.empty(0, np.int64)), settings())
    assert caught.value.code == "no-examples"


def test_bf16_computes_in_bf16_and_stays_close() -> None:
    bench, examples = vit(), digits()
    full, result = trained(bench, examples, settings(epochs=2))
    half, rough = trained(bench, examples, settings(epochs=2, precision="bf16"))
    assert half.dtype == np.float32
    assert rough.loss != result.loss
    assert rough.loss == pytest.approx(result.loss, rel=0.05)
    step, other = full - noisy(bench), half - noisy(bench)
    assert step @ other / (np.linalg.norm(step) * np.linalg.norm(other)) > 0.8
    assert all(p.dtype == torch.float32 for p in bench.model.parameters())


def test_training_on_digits_learns_them() -> None:
    bench, examples = vit(), digits(200)
    bench.put()
    before = evaluate(bench.model, examples, classes=10).tally
    _, result = trained(
        bench, examples, settings(epochs=3, learning_rate=5e-3), start=bench.initial
    )
    after = evaluate(bench.model, examples, classes=10).tally
    assert after.mean_loss < 0.6 * before.mean_loss
    assert after.accuracy > before.accuracy
    assert after.mean_loss < result.loss < before.mean_loss


# Evaluation


def test_evaluation_counts_every_example_once_in_order() -> None:
    bench, examples = vit(), digits(150)  # more than two batches
    bench.put()
    measured = evaluate(bench.model, examples, classes=10)
    with torch.inference_mode():
        logits = bench.model(**examples.batch(np.arange(150))).logits
    labels = torch.from_numpy(examples.labels)
    right = (logits.argmax(-1) == labels).numpy()
    assert np.array_equal(measured.correct, right)
    assert measured.tally.examples == 150
    assert measured.tally.correct == right.sum()
    assert measured.tally.confusion.sum(1).tolist() == np.bincount(examples.labels).tolist()
    wanted = float(torch.nn.functional.cross_entropy(logits, labels))
    assert measured.tally.mean_loss == pytest.approx(wanted, rel=1e-5)


def test_evaluation_is_in_eval_mode_whatever_the_model_was_in(tmp_path: Path) -> None:
    bench = bert(tmp_path)
    bench.put()
    quiet = evaluate(bench.model, texts(), classes=10).tally.loss
    bench.model.train()
    assert evaluate(bench.model, texts(), classes=10).tally.loss == quiet


def test_training_leaves_the_model_in_eval_mode() -> None:
    bench = vit(dropout=0.3)
    trained(bench, digits(8), settings(dropout=0.3))
    assert not any(module.training for module in bench.model.modules())


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
    bench = open_workbench(parse_job(raw, where="test"))
    pixels = np.random.default_rng(0).normal(size=(16, 1, 32, 32)).astype(np.float32)
    examples = ImageExamples(np.arange(16) % 10, pixels, np.arange(16))
    before = _state(bench)
    trained(bench, examples, settings())
    drifted = [
        name for name, value in _state(bench).items() if not torch.equal(value, before[name])
    ]
    assert set(drifted) <= set(bench.layout.names)
