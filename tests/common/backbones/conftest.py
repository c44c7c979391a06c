"""A small BERT, as its maker has it, in a folder, and a copy of that to spoil."""

import shutil
from pathlib import Path

import pytest
import torch
from support.bert_folders import bert_config
from torch import nn
from transformers import BertForSequenceClassification


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """A BERT with a trained head, as its maker has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BertForSequenceClassification(bert_config()).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; not to be written to."""
    folder = tmp_path_factory.mktemp("bert")
    original.save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the BERT folder to spoil."""
    shutil.copytree(saved, tmp_path / "bert")
    return tmp_path / "bert"
