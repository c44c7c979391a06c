"""Folders of a small BERT: loaded for a job, refused, edited."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig

from fedgraft.common.backbones.load import LoadedBackbone, find_backbone, load
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError

__all__ = [
    "IMAGE",
    "LABELS",
    "TEXT",
    "TOKENS",
    "bert_config",
    "edit_config",
    "job",
    "move_weights",
    "open_model",
    "refused",
    "same",
]


LABELS = ("cat", "dog", "owl")
TOKENS = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
TEXT, IMAGE = "text-classification", "image-classification"


def bert_config(labels: tuple[str, ...] = LABELS) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )


def job(
    source: Path | str,
    *,
    labels: tuple[str, ...] = LABELS,
    task: str = TEXT,
    seed: int = 0,
    weights: str = "pretrained",
) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "t", "task": task, "labels": labels, "seed": seed},
            "backbone": {
                "source": f"path:{source}" if isinstance(source, Path) else source,
                "weights": weights,
            },
            "method": {"kind": "head"},
        }
    )


def open_model(source: Path | str, **keys: Any) -> LoadedBackbone:
    settings = job(source, **keys)
    found = find_backbone(settings.backbone.source, weights=settings.backbone.weights)
    return load(found, settings)


def refused(call: Callable[[], object]) -> BackboneError:
    with pytest.raises(BackboneError) as caught:
        call()
    assert caught.value.hint
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def move_weights(folder: Path, shard: Path, save: Callable[[Any, Path], None]) -> None:
    """Put the weights into ``shard``, which an index file names: transformers follows it."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    shard.parent.mkdir(exist_ok=True)
    save(tensors, shard)
    where = os.path.relpath(shard, folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "decoy.safetensors").write_bytes(b"")
