"""Tiny backbones of several architectures, made once a module."""

import pytest
import torch
from peft import PeftModel
from support.tiny_backbones import Bench, build


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sources of the backbones by name."""
    sources = {"vit": "builtin:glyph-vit"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name in ("bert", "gpt2", "resnet", "convnext"):
            folder = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(folder)  # type: ignore[operator]
            sources[name] = f"path:{folder}"
    return sources


@pytest.fixture(scope="module")
def bench(folders: dict[str, str]) -> Bench:
    return Bench(folders)


@pytest.fixture(scope="module")
def bert(bench: Bench) -> PeftModel:
    """A small adapter on BERT; its values may be overwritten."""
    return bench.adapted("bert", targets=["query", "value"])
