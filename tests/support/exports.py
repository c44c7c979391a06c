"""A finished run of each kind of backbone, small and random, to give away in every form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.layout import Vector
from fedgraft.server.export.adapter import export_adapter, export_merged
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import RoundRecord, State

__all__ = ["Exported", "logits", "make_inputs", "make_job", "save_bert", "save_resnet"]

LABELS = ["north", "east", "south"]
DIGITS = [str(digit) for digit in range(10)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "card", "lost"]


def save_bert(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    ids = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_resnet(folder: Path) -> None:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        num_labels=3, image_size=16,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():  # statistics as pre-training leaves them, not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model.save_pretrained(folder)


def make_job(kind: str, folder: Path) -> Job:
    lora = {"kind": "lora", "rank": 2, "head": "shared"}
    methods: dict[str, dict[str, Any]] = {
        "vit": {**lora, "targets": ["q_proj", "fc1"]},
        "vit-head": {"kind": "head"},
        "vit-dora": {**lora, "targets": ["q_proj", "fc1"], "dora": True, "rslora": True},
        "vit-partial": {"kind": "partial", "blocks": 1, "norms": True, "head": "shared"},
        "vit-biases": {"kind": "partial", "blocks": 0, "biases": True, "head": "shared"},
        "bert": {**lora, "targets": "all-linear", "alpha": 5.0},
        "resnet": {**lora, "targets": "all-conv"},
    }
    source = "builtin:glyph-vit"
    if kind in ("bert", "resnet"):
        folder.mkdir()
        {"bert": save_bert, "resnet": save_resnet}[kind](folder)
        source = f"path:{folder}"
    task = "text-classification" if kind == "bert" else "image-classification"
    raw = {
        "job": {"name": f"try-{kind}", "task": task, "labels": DIGITS if "vit" in kind else LABELS},
        "backbone": {"source": source},
        "method": methods[kind],
        "data": {"max_length": 16},
        "simulation": {"train": str(folder.parent / "secret-rows.jsonl"), "sites": 2},
    }
    return parse_job(raw, where="test")


def make_inputs(kind: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    if kind == "bert":
        ids = torch.randint(1, len(WORDS), (4, 6), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    side = 16 if kind == "resnet" else 8
    return {"pixel_values": torch.randn(4, 1, side, side, generator=draw)}


@torch.inference_mode()
def logits(model: Any, kind: str) -> torch.Tensor:
    return model.eval()(**make_inputs(kind)).logits.clone()  # type: ignore[no-any-return]


class Exported:
    """A run of two rounds with an adapter far from its initial values."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        job = make_job(kind, folder / "backbone")
        self.bench: Workbench = open_workbench(job)
        self.run = Run.create(folder / "runs", job)
        self.plan: Plan = make_plan(job, self.bench, self.run.session)
        start = self.bench.initial_of(self.plan.exchanged)
        noise = np.random.default_rng(4).normal(0, 0.05, start.shape)
        self.adapter: Vector = (start + noise).astype(np.float32)
        for number in (1, 2):
            record = RoundRecord(number, 2, 2, (), 20, 0.5, 0.1, None, 10, 10, 1.0)
            self.run.commit(State(number, self.adapter), record, self.plan.exchanged)
        self.bench.put((self.plan.exchanged, self.adapter))
        self.wanted = logits(self.bench.model, kind)
        self.bench.put()
        self.untrained = logits(self.bench.model, kind)

    def peft(self, target: Path) -> Path:
        export_adapter(self.run, self.bench, self.plan.exchanged, self.adapter, target)
        return target

    def merged(self, target: Path) -> Path:
        export_merged(self.run, self.bench, self.plan.exchanged, self.adapter, target)
        return target

    def onnx(self, target: Path) -> Path:
        from fedgraft.server.export.onnx import export_onnx

        export_onnx(self.run, self.bench, self.plan.exchanged, self.adapter, target)
        return target
