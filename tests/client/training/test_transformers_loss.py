"""A batch of texts has the loss and the gradient that transformers has for the same batch.

The loss of a batch is a mean over its tokens, so a long text counts more than a short one: in one
pass of several sites, in micro-batches, and where memory is short.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.language_models import job_settings, save_language_model
from support.matrix import thinned
from support.trainings import noisy, settings

from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model import forward
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.model.forward import logits_of
from fedgraft.client.training.objective import PassLoss
from fedgraft.client.training.trainer import Trained, TrainingTask, train
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.examples import Examples
from fedgraft.common.tasks.masked_lm import MaskedLm

KINDS = ("gpt2", "llama", "t5", "bert", "tags")
ROWS = ("ab", "the quick brown fox jumps over it", "abc", "hello there my friend, good night")
OTHER_ROWS = ("of this and of that and of nothing", "d", "ef", "a b c d e f")
Gradients = list[NDArray[np.float32]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gradients]:
    """The gradients of whole batches, [sites, values], as the optimiser gets them."""
    taken: Gradients = []

    def pull(self: PassLoss, gradient: torch.Tensor, *_: Any) -> None:
        taken.append(gradient.detach().cpu().numpy().copy())

    monkeypatch.setattr(PassLoss, "pull", pull)
    # Both losses are then of the same hidden tokens: those of evaluation.
    monkeypatch.setattr(MaskedLm, "corruption", lambda self, examples: None)
    yield taken


def opened(kind: str, folder: Path, *texts: tuple[str, ...]) -> tuple[Stack, list[Examples]]:
    """A stack of this kind, and the examples of each tuple of ``texts``."""
    backbone = save_language_model("bert" if kind == "tags" else kind, folder / "backbone")
    kind_of_job = "bert" if kind == "tags" else kind
    raw = job_settings(kind_of_job, backbone, str(folder / "*.jsonl"), max_length=48)
    if kind == "tags":
        raw["job"] |= {"task": "token-classification", "labels": ["O", "B-x"]}
        raw["method"]["head"] = "shared"
    job = parse_job(raw, where="test")
    stack = open_stack(job)
    examples = []
    for number, some in enumerate(texts):
        path = folder / f"{number}.jsonl"
        rows = [{"text": text, "target": text[::-1]} for text in some]
        if kind == "tags":
            rows = [{"tokens": text.split(), "tags": tags_of(text)} for text in some]  # type: ignore[dict-item]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = read_split(str(path), job).dataset
        examples.append(encode(dataset, stack.bench.processor, job, store=None, key=""))
    return stack, examples


def tags_of(text: str) -> list[str]:
    return ["B-x" if len(word) > 3 else "O" for word in text.split()]


def by_transformers(stack: Stack, examples: Examples) -> tuple[float, NDArray[np.float32]]:
    """The loss that Trainer minimises for one batch of all ``examples``, and its gradient."""
    bench, index = stack.bench, np.arange(len(examples))
    bench.put((bench.layout, noisy(bench)))
    model = bench.model.eval()
    model.requires_grad_(False)
    parameters = {n: p for n, p in model.named_parameters() if n in bench.layout.slices}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    batch = {name: torch.from_numpy(value) for name, value in examples.batch(index).items()}
    labels = torch.from_numpy(examples.targets(index))
    if bench.task.name == "causal-lm":  # transformers shifts the labels itself
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    ordered = [parameters[name] for name in bench.layout.names]
    found = torch.autograd.grad(loss, ordered)
    return float(loss.detach()), np.concatenate([one.reshape(-1).numpy() for one in found])


def by_us(stack: Stack, sites: list[Examples], **changes: Any) -> list[Trained]:
    wanted = settings(batch_size=4, **changes)
    start = noisy(stack.bench)
    tasks = [TrainingTask(one, start, torch.Generator().manual_seed(0)) for one in sites]
    found = train(stack, stack.bench.layout, tasks, settings=wanted)
    assert all(isinstance(one, Trained) for one in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("accumulation", thinned([2, 1, 4], 3))
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_transformers(
    kind: str, accumulation: int, tmp_path: Path, seen: Gradients
) -> None:
    stack, sites = opened(kind, tmp_path, ROWS, OTHER_ROWS)
    wanted = [by_transformers(stack, one) for one in sites]
    found = by_us(stack, sites, accumulation=accumulation)
    for number, (loss, gradient) in enumerate(wanted):
        assert found[number].loss == pytest.approx(loss, abs=1e-6)
        np.testing.assert_allclose(seen[0][number], gradient, rtol=0, atol=1e-6)


def test_a_batch_that_memory_cannot_hold_has_the_same_gradient(
    tmp_path: Path, seen: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, sites = opened("gpt2", tmp_path, ROWS)
    loss, gradient = by_transformers(stack, sites[0])

    def short(feeds: Any, indices: Any, width: int, vary: Any) -> torch.Tensor:
        if len(indices[0]) > 2:
            raise torch.OutOfMemoryError
        return logits_of(feeds, indices, width, vary)

    monkeypatch.setattr(forward, "logits_of", short)
    assert by_us(stack, sites)[0].loss == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(seen[0][0], gradient, rtol=0, atol=1e-6)


def test_the_loss_of_an_epoch_is_a_mean_over_all_its_tokens(tmp_path: Path) -> None:
    """Batches differ in their tokens; the mean of their means would be another number."""
    stack, (examples,) = opened("gpt2", tmp_path, (*ROWS, *OTHER_ROWS))
    still = by_us(stack, [examples], learning_rate=1e-12)[0]
    assert still.loss == pytest.approx(by_transformers(stack, examples)[0], abs=1e-5)
