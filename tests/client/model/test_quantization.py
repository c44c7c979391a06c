"""Frozen layers in 8 or 4 bits: what they compute, what they take, and what stays as it was."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.companies import Company
from support.federations import digits_job, run_digits
from support.trainings import digits, make_job, noisy, open_small, settings, trained
from torch import nn

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import Stack, check_stacking, open_stack
from fedgraft.client.model.forward import open_feed
from fedgraft.client.model.frozen_prefix import identity_of
from fedgraft.common.adapters.model import cache_folder
from fedgraft.common.adapters.resident import close_backbone
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError, InputError, JobError

pytest.importorskip("bitsandbytes", reason="pip install fedgraft[quantize]")


def wide_job(quantize: str, precision: str = "fp32", **method: Any) -> Job:
    """A transformer whose layers have blocks of 64."""
    folder = cache_folder() / "small-models" / "wide-vit"
    if not folder.exists():
        transformers.ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=3,
            num_attention_heads=2, intermediate_size=128, initializer_range=0.1,
        ).save_pretrained(folder)  # fmt: skip
    lora = {"kind": "lora", "rank": 2, "head": "shared", "targets": ["q_proj", "fc1"]}
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": [str(i) for i in range(10)]},
        "backbone": {"source": f"path:{folder}", "weights": "random", "quantize": quantize},
        "method": {**lora, **method},
        "training": {"precision": precision},
    }
    return parse_job(raw, where="test")


@torch.inference_mode()
def logits(stack: Stack, seed: int = 8) -> torch.Tensor:
    stack.put_one(stack.bench.layout, noisy(stack.bench, seed=seed))
    return stack.logits(as_tensors(digits(16).batch(np.arange(16))))


def layers(stack: Stack) -> list[nn.Module]:
    return [m for m in stack.model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]


@pytest.mark.parametrize(("quantize", "most"), [("8bit", 0.05), ("4bit", 0.5)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_computes_nearly_the_same(quantize: str, most: float, precision: str) -> None:
    exact, coarse = (open_stack(wide_job(q)) for q in ("none", quantize))
    coarse = open_stack(wide_job(quantize, precision))
    wanted, found = logits(exact), logits(coarse)
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < most
    assert len(layers(coarse)) == 3 * 6 and not layers(exact)
    head = coarse.model.get_submodule("classifier")
    assert not layers_in(head)


def layers_in(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if "bit" in type(m).__name__]


def test_four_bits_are_what_bitsandbytes_makes_whole_again() -> None:
    from bitsandbytes.functional import dequantize_4bit

    close_backbone()
    stack = open_stack(wide_job("4bit"))
    whole = {}
    for name, made in stack.model.named_modules():
        if type(made).__name__ == "Linear4bit":
            weight: Any = (
                made.weight
            )  # before the first pass, for which a CPU puts it in order anew
            whole[name] = dequantize_4bit(weight.data, weight.quant_state).float()
    found = logits(stack)
    for name, weights in whole.items():
        made = stack.model.get_submodule(name)
        plain = nn.Linear(weights.shape[1], weights.shape[0])
        plain.weight.data, plain.bias = weights, made.bias  # type: ignore[assignment]
        parent, _, leaf = name.rpartition(".")
        setattr(stack.model.get_submodule(parent), leaf, plain)
    torch.testing.assert_close(logits(stack), found, rtol=0, atol=1e-4)
    close_backbone()  # nobody else gets this one


@pytest.mark.parametrize(("quantize", "share"), [("8bit", 0.30), ("4bit", 0.20)])
def test_it_takes_less_memory(quantize: str, share: float) -> None:
    exact, coarse = (open_stack(wide_job(q)) for q in ("none", quantize))
    names = [name for name, m in coarse.model.named_modules() if "bit" in type(m).__name__]
    sizes = []
    for stack in (exact, coarse):
        found = [stack.model.get_submodule(name) for name in names]
        sizes.append(sum(p.numel() * p.element_size() for m in found for p in m.parameters()))
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_what_trains_trains(quantize: str) -> None:
    stack = open_stack(wide_job(quantize))
    losses = [
        trained(stack, digits(40), settings(epochs=epochs, learning_rate=5e-3)).loss * epochs
        for epochs in (1, 2, 6)
    ]
    assert losses[2] / 6 < 0.8 * losses[0]
    frozen = layers(stack)
    assert not any(p.requires_grad for m in frozen for p in m.parameters())


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_company_makes_little_difference(quantize: str) -> None:
    stack = open_stack(wide_job(quantize))
    check_stacking(stack, as_tensors(digits(4).batch(np.arange(4))))
    if quantize == "4bit":  # 8 bits round what comes in, and a last bit may go either way
        Company(stack, [digits(9), digits(14, 30)], settings(epochs=2)).check(1e-4)


def test_what_is_kept_of_frozen_layers_is_its_own() -> None:
    stacks = [
        open_stack(wide_job(q, targets=["layers.2.mlp.fc1"])) for q in ("none", "8bit", "4bit")
    ]
    assert len({identity_of(stack, "vit.layers.2") for stack in stacks}) == 3
    coarse = stacks[2]
    feed = open_feed(coarse, coarse.bench.layout, digits(16), None)
    assert feed.prefix is not None  # and it was proved


def test_the_workbench_keeps_the_exact_backbone() -> None:
    stack = open_stack(wide_job("4bit"))
    assert all(p.dtype == torch.float32 for p in stack.bench.model.parameters())


# Refused


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(JobError, match="dora"):
        wide_job("4bit", dora=True)
    job = make_job("resnet")
    coarse = job.model_copy(
        update={"backbone": job.backbone.model_copy(update={"quantize": "4bit"})}
    )
    with pytest.raises(BackboneError, match="no linear layer"):
        open_stack(coarse)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    close_backbone()
    with pytest.raises(InputError, match="needs bitsandbytes") as caught:
        open_stack(wide_job("4bit"))
    assert "fedgraft[quantize]" in caught.value.hint


def test_a_federation_runs_on_four_bits(tmp_path: Path) -> None:
    run, _ = run_digits(tmp_path, "backbone.quantize=4bit", "rounds.count=2")
    losses = [one["train_loss"] for one in run.history()]
    assert losses[1] < losses[0]
    assert digits_job("backbone.quantize=8bit").backbone.bits == 8
    assert open_small("vit").bits == 0
