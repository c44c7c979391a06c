"""Small models of every kind, rows for them, and training by the book to compare with."""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.training.trainer import Span, Trained, TrainingTask, learning_rate, train_alone
from fedgraft.common.adapters.attach import read
from fedgraft.common.adapters.model import Workbench, cache_folder
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.config.training import Training
from fedgraft.common.examples import Examples, ImageExamples, TextExamples
from fedgraft.common.layout import Layout, Vector

__all__ = [
    "KINDS",
    "LORA",
    "TOP",
    "book",
    "digits",
    "felt",
    "make_job",
    "noisy",
    "open_small",
    "rows_for",
    "settings",
    "task",
    "texts",
    "trained",
]

LABELS = [str(i) for i in range(10)]
WORDS = 40
MAX_LENGTH = 48
LORA = {"kind": "lora", "rank": 2, "head": "shared"}
TARGETS: dict[str, Any] = {
    "vit": ["q_proj", "v_proj"],
    "deep-vit": ["q_proj", "v_proj"],
    "resnet": "all-conv",
    "bert": ["query", "value"],
    "roberta": ["query", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
}
KINDS = tuple(TARGETS)
# Only some of the upper layers: those below are then the same in every epoch.
TOP: dict[str, list[str]] = {
    "deep-vit": ["layers.2.attention.q_proj", "layers.3.mlp.fc1"],
    "bert": ["layer.2.attention.self.query", "layer.2.output.dense", "pooler.dense"],
    "roberta": ["layer.1.attention.self.query"],
    "gpt2": ["h.2.attn.c_attn"],
    "llama": ["layers.2.self_attn.q_proj", "layers.2.mlp.down_proj"],
    "resnet": ["stages.1.layers.0.layer.0.convolution"],
}
TEXT_KINDS = ("bert", "roberta", "gpt2", "llama")
_TEXT: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0,
    "hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4, "classifier_dropout": 0.4,
}  # fmt: skip


def _config(kind: str) -> Any:
    if kind == "bert":
        return transformers.BertConfig(max_position_embeddings=64, **_TEXT)
    if kind == "roberta":
        return transformers.RobertaConfig(max_position_embeddings=70, **_TEXT)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=3, n_head=2, n_positions=64, pad_token_id=0,
            initializer_range=0.3, resid_pdrop=0.4, attn_pdrop=0.4, embd_pdrop=0.4,
        )  # fmt: skip
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64,
            pad_token_id=0, initializer_range=0.3,
        )  # fmt: skip
    if kind == "deep-vit":
        return transformers.ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=4,
            num_attention_heads=2, intermediate_size=24, initializer_range=0.3,
        )  # fmt: skip
    return transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
        image_size=8,
    )  # fmt: skip


def _write(kind: str, folder: Path) -> None:
    """A folder with ``config.json`` and what prepares inputs; weights are drawn."""
    folder.mkdir(parents=True)
    _config(kind).save_pretrained(folder)
    if kind in TEXT_KINDS:
        words = {"[PAD]": 0, "[UNK]": 1}
        Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))


def make_job(
    kind: str, /, *, training: dict[str, Any] | None = None, seed: int = 0, **method: Any
) -> Job:
    """A job for a small model: ``method`` changes low-rank factors at the usual targets."""
    folder = cache_folder() / "small-models" / kind
    if kind != "vit" and not folder.exists():
        _write(kind, folder)
    backbone = {"source": f"path:{folder}", "weights": "random"}
    what = "text" if kind in TEXT_KINDS else "image"
    full = (
        method
        if method.get("kind", "lora") != "lora"
        else {**LORA, "targets": TARGETS[kind], **method}
    )
    raw = {
        "job": {"name": "t", "task": f"{what}-classification", "labels": LABELS, "seed": seed},
        "backbone": {"source": "builtin:glyph-vit"} if kind == "vit" else backbone,
        "method": full,
        "training": training or {},
        "data": {"max_length": MAX_LENGTH},
    }
    return parse_job(raw, where="test")


def open_small(kind: str, /, *, precision: str = "fp32", seed: int = 0, **method: Any) -> Stack:
    """The stack of a small model; it is built once in this process."""
    return _open_small(kind, precision, seed, json.dumps(method, sort_keys=True))


@lru_cache(maxsize=64)  # fedgraft keeps three, and the parameters of a test name more kinds
def _open_small(kind: str, precision: str, seed: int, method: str) -> Stack:
    training = {"precision": precision}
    return open_stack(make_job(kind, training=training, seed=seed, **json.loads(method)))


@lru_cache(maxsize=1)
def _bunch() -> Any:
    return load_digits()


def digits(count: int = 24, start: int = 0) -> ImageExamples:
    """Real digits, standardised one by one as the backbone wants them."""
    bunch = _bunch()
    rows = slice(start, start + count)
    pixels = (bunch.images[rows] / 16).astype(np.float32)[:, None]
    mean, std = pixels.mean((1, 2, 3), keepdims=True), pixels.std((1, 2, 3), keepdims=True)
    labels = bunch.target[rows].astype(np.int64)
    return ImageExamples(labels, (pixels - mean) / (std + 0.05), np.arange(count, dtype=np.int64))


def texts(
    count: int = 24, seed: int = 1, *, longest: int = 40, pad_left: bool = False
) -> TextExamples:
    """Random tokens, up to ``longest`` in a row, and labels."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, count)
    return TextExamples(
        labels=draw.integers(0, 10, count),
        ids=draw.integers(2, WORDS, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=None,
        pad_id=0,
        pad_left=pad_left,
        longest=MAX_LENGTH,
    )


def rows_for(kind: str, count: int, seed: int = 1) -> Examples:
    """Examples that a small model of this kind reads, padded as is usual for it."""
    if kind in TEXT_KINDS:
        return texts(count, seed, pad_left=kind == "llama")
    return digits(count, 50 * seed)


def settings(**changes: Any) -> Training:
    """Plain training settings with some changed."""
    plain = {"batch_size": 8, "learning_rate": 1e-3, "schedule": {"shape": "constant"}}
    return Training.model_validate({"clip_norm": 0, **plain, **changes})


def noisy(bench: Workbench, layout: Layout | None = None, *, seed: int = 8) -> Vector:
    """A start that is not the initial one: factors B are then no longer zero."""
    noise = np.random.default_rng(seed).normal(0, 0.05, bench.layout.size)
    whole = (bench.initial + noise).astype(np.float32)
    return whole if layout is None else bench.layout.part(whole, layout)


def felt(layout: Layout) -> NDArray[np.bool_]:
    """Which values the loss depends on: all but the biases of an attention's keys, [layout.size].

    They move all scores of a query alike, which softmax takes out: their gradient is rounding,
    and of that AdamW makes whole steps.
    """
    mask = np.ones(layout.size, bool)
    for name, where in layout.slices.items():
        if name.endswith(("key.bias", "k_proj.bias")):
            mask[where] = False
        elif name.endswith("c_attn.bias"):
            third = (where.stop - where.start) // 3
            mask[where.start + third : where.start + 2 * third] = False
    return mask


def task(examples: Examples, start: Vector, *, seed: int = 1, **more: Any) -> TrainingTask:
    """A task with a generator of its own."""
    return TrainingTask(examples, start, torch.Generator().manual_seed(seed), **more)


def trained(
    stack: Stack,
    examples: Examples,
    wanted: Training,
    *,
    layout: Layout | None = None,
    seed: int = 1,
    span: Span | None = None,
    start: Vector | None = None,
) -> Trained:
    """Train one site from a noisy start."""
    layout = layout or stack.bench.layout
    start = noisy(stack.bench, layout) if start is None else start
    return train_alone(stack, layout, task(examples, start, seed=seed), settings=wanted, span=span)


def book(
    bench: Workbench,
    examples: Examples,
    wanted: Training,
    *,
    layout: Layout | None = None,
    seed: int = 1,
    span: Span = Span(),  # noqa: B008  # frozen
) -> tuple[Vector, float]:
    """Training by the book: peft's own model, a tensor at a time, stock AdamW, one batch a step.

    What it came to, and the mean loss. There is no dropout in it.
    """
    layout = layout or bench.layout
    bench.put((layout, noisy(bench, layout)))
    model = bench.model.eval()
    pairs = [(n, p) for n, p in model.named_parameters() if n in layout.slices]
    model.requires_grad_(False)
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
            logits = model(**as_tensors(examples.batch(batch.numpy()))).logits
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
    came = read(model, layout)
    bench.put()
    return came, total / (len(examples) * wanted.epochs)
