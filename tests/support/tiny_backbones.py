"""Tiny models of several architectures with random weights, and adapters on them."""

from math import prod
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from fedgraft.common.adapters.attach import attach
from fedgraft.common.backbones.load import find_backbone, load
from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout, Vector

__all__ = [
    "INPUTS",
    "LABELS",
    "RANK",
    "Bench",
    "build",
    "factors",
    "logits",
    "some_vector",
    "trainable",
]


RANK = 3
LABELS = {0: "cat", 1: "dog", 2: "owl"}
INPUTS = {
    "bert": {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])},
    "gpt2": {"input_ids": torch.tensor([[1, 2, 3, 4]])},
    "vit": {"pixel_values": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)},
    "resnet": {"pixel_values": torch.linspace(-1, 1, 512).reshape(2, 1, 16, 16)},
    "convnext": {"pixel_values": torch.linspace(-1, 1, 512).reshape(2, 1, 16, 16)},
}


def build(name: str) -> nn.Module:
    """A tiny model of this architecture with random weights, not yet frozen."""
    labels: Any = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    if name == "bert":
        bert = BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
            **labels,
        )
        return BertForSequenceClassification(bert)  # type: ignore[no-any-return]
    if name == "gpt2":
        gpt2 = GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **labels
        )
        return GPT2ForSequenceClassification(gpt2)  # type: ignore[no-any-return]
    if name == "resnet":
        resnet = ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
            **labels,
        )
        return ResNetForImageClassification(resnet)  # type: ignore[no-any-return]
    convnext = ConvNextConfig(
        num_channels=1, patch_size=2, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, **labels
    )
    return ConvNextForImageClassification(convnext)  # type: ignore[no-any-return]


class Bench:
    """Loads tiny backbones and attaches what a method asks for."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources

    def job(self, name: str, *, seed: int = 0, **method: Any) -> Job:
        labels = [str(digit) for digit in range(10)] if name == "vit" else list(LABELS.values())
        text = name in ("bert", "gpt2")
        if method.get("kind") != "head":
            method = {"kind": "lora", "rank": RANK, "head": "shared"} | method
        return Job.model_validate(
            {
                "job": {
                    "name": "t",
                    "task": "text-classification" if text else "image-classification",
                    "labels": labels,
                    "seed": seed,
                },
                "backbone": {"source": self.sources[name]},
                "method": method,
            }
        )

    def backbone(self, name: str) -> nn.Module:
        return load(find_backbone(self.sources[name]), self.job(name)).model

    def adapted(self, name: str, **method: Any) -> PeftModel:
        return attach(self.backbone(name), self.job(name, **method))


def factors(module: nn.Module, rank: int) -> int:
    """How many parameters A and B of this module have, from its own sizes."""
    if isinstance(module, nn.Linear):
        return rank * (module.in_features + module.out_features)
    if isinstance(module, Conv1D):
        return rank * int(sum(module.weight.shape))
    assert isinstance(module, nn.Conv2d)
    return rank * module.in_channels * prod(module.kernel_size) + module.out_channels * rank


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**INPUTS[name]).logits
    return out


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def some_vector(layout: Layout, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
