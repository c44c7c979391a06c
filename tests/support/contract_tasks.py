"""A tiny random backbone and a job for any task by its contract alone, also for one to come."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from support.contract import Federation
from support.contract_refusals import merged
from support.contract_rows import FORMS, Row, draw_rows
from support.language_models import CHARACTERS, CLOZE, save_tokenizer

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.examples import Inputs
from fedgraft.common.section import IllegalJob
from fedgraft.common.tasks import TASKS, Task

__all__ = ["BACKBONES", "TaskCase", "save_backbone", "save_settings", "write_sites"]

LABELS = (("no", "yes"), ("O", "B-x", "I-x"))
SIZES = {"ash": 8, "beech": 10, "cedar": 9}
"""Rows to train on of each site."""
TESTED = 4

_DEPTH: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "initializer_range": 0.3,
}  # fmt: skip
_WORDS: dict[str, Any] = {
    "vocab_size": len(CHARACTERS) + len(CLOZE), "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
_PIXELS: dict[str, Any] = {"image_size": 8, "patch_size": 4, **_DEPTH}

BACKBONES: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("text", lambda: hf.BertConfig(**_WORDS, **_DEPTH, max_position_embeddings=64)),
    (
        "text",
        lambda: hf.GPT2Config(
            **_WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
        ),
    ),
    (
        "text",
        lambda: hf.T5Config(
            **_WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            decoder_start_token_id=0,
        ),
    ),
    ("image", lambda: hf.ViTConfig(num_channels=1, **_PIXELS)),
    (
        "audio",
        lambda: hf.Wav2Vec2Config(
            **_DEPTH, vocab_size=8, conv_dim=(8, 8, 8), conv_stride=(5, 4, 4),
            conv_kernel=(10, 8, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
        ),
    ),
    (
        "video",
        lambda: hf.VideoMAEConfig(num_channels=3, num_frames=4, tubelet_size=2, **_PIXELS),
    ),
)  # fmt: skip
"""What each reads, and its configuration: the first that fits a task is the task's."""


def config_for(task: Task) -> Any:
    """The first configuration that the task's class of transformers knows and that reads alike."""
    known = getattr(hf, task.auto_class)._model_mapping
    for reads, make in BACKBONES:
        config = make()
        # BERT is known as a decoder, too: it would read the token that it is to predict.
        encoder = type(config) in hf.AutoModelForMaskedLM._model_mapping
        ahead = encoder and known is hf.AutoModelForCausalLM._model_mapping
        if reads == task.modality.name and type(config) in known and not ahead:
            return config
    raise NotImplementedError(f"{task.auto_class} knows none of BACKBONES: add a tiny one here")


def save_backbone(task: Task, folder: Path) -> Path:
    """Random weights with a head for the labels of ``labels_of``, and a tokenizer of characters."""
    config = config_for(task)
    options = task.model_options(config.to_dict(), labels_of(task), "test")
    config = type(config).from_dict({**config.to_dict(), **options})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        getattr(hf, task.auto_class).from_config(config).save_pretrained(folder)
    save_settings(config, folder, words=not task.modality.files)
    return folder


def save_settings(config: Any, folder: Path, *, words: bool) -> None:
    """``config`` and, where it reads ``words``, a tokenizer of characters.

    BERT's gives types of tokens beside, has a token for gaps, and begins and ends what it reads.
    """
    config.save_pretrained(folder)
    if not words:
        return
    bert = isinstance(config, hf.BertConfig)
    save_tokenizer(folder, cloze=bert)
    if bert:
        path = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        path.write_text(json.dumps({**json.loads(path.read_text()), **names}))


def labels_of(task: Task) -> tuple[str, ...]:
    """The first of ``LABELS`` that the task accepts; none where it wants none."""
    if not task.wants_labels:
        return ()
    for labels in LABELS:
        try:
            task.check_labels(labels)
        except IllegalJob:
            continue
        return labels
    raise NotImplementedError(f"{task.name} accepts none of LABELS: add some that it does")


def raw_job(name: str, backbone: Path, sites: Path) -> dict[str, Any]:
    """A job of two rounds over the sites that ``write_sites`` wrote."""
    task = TASKS[name]
    head = "frozen" if "trained_head" in task.refuses else "shared"
    return {
        "job": {"name": name, "task": name, "labels": list(labels_of(task))},
        "backbone": {"source": f"path:{backbone}"},
        "method": {"kind": "lora", "rank": 2, "head": head},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "rounds": {"count": 2},
        "data": {"max_length": 32, "seconds": 0.25, "validation": 0.25},
        "simulation": {
            "train": f"{sites}/*/train/rows.jsonl", "test": f"{sites}/*/test/rows.jsonl",
            "partition": {"kind": "natural"}, "baselines": ["zero_shot", "local_only"],
            "finetune_epochs": 0, "workers": 0, "sites_per_pass": 1, "device": "cpu",
        },
    }  # fmt: skip


def write_sites(job: Job, folder: Path, count: int) -> dict[str, dict[str, list[Row]]]:
    """Files of ``count`` sites below ``folder``; the rows of each, by site and split."""
    written: dict[str, dict[str, list[Row]]] = {}
    for number, (site, size) in enumerate(list(SIZES.items())[:count]):
        written[site] = {}
        for at, (split, rows) in enumerate((("train", size), ("test", TESTED))):
            made = draw_rows(job, rows, folder / "made", seed=2 * number + at)
            FORMS["jsonl"](job, made, folder / site / split)
            written[site][split] = made
    return written


class TaskCase:
    """A task with a tiny backbone below ``folder``, rows of two sites, and their federation."""

    def __init__(self, name: str, folder: Path) -> None:
        self.task, self.folder = TASKS[name], folder
        self.backbone = save_backbone(self.task, folder / "backbone")
        self._raw = raw_job(name, self.backbone, folder / "sites")
        self.job = self.ask({})
        self.rows = write_sites(self.job, folder / "sites", 2)
        self.federation = Federation(self.job, folder / "runs")

    def ask(self, over: Mapping[str, Any]) -> Job:
        """The job with other settings.

        Raises:
            JobError: it is refused.
        """
        return parse_job(merged(self._raw, over), where="test")

    @cached_property
    def inputs(self) -> Inputs:
        """The test examples of a site, as the model reads them."""
        examples = self.federation.site(self.federation.simulated).splits(self.job).test
        return examples.batch(np.arange(len(examples)))
