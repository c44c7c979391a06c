"""A stack computes what peft's own model does, for one site and for several side by side."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.ia3 import Linear as Ia3Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from support.matrix import thinned
from support.trainings import (
    KINDS,
    LORA,
    digits,
    make_job,
    noisy,
    open_small,
    rows_for,
    settings,
    texts,
    trained,
)
from tokenizers import Tokenizer, models
from torch import nn

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model import quantization
from fedgraft.client.model.batched_model import Stack, check_stacking, open_stack
from fedgraft.client.model.batched_modules import TWINS, Stacked, stacked_module, trained_tensor
from fedgraft.client.model.randomness import Randomness
from fedgraft.common.adapters.resident import close_backbone
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import AdapterError, InputError
from fedgraft.common.layout import Vector, is_factor_a
from fedgraft.common.methods.lora import LoraMethod

EVERY: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"kind": "head"}) for kind in KINDS),
    *((kind, {"targets": "all-linear"}) for kind in ("vit", "bert", "roberta", "gpt2")),
    *((kind, {"kind": "partial", "blocks": 1, "head": "shared"}) for kind in KINDS),
    *((kind, {"kind": "partial", "blocks": 0, "norms": True, "head": "frozen"}) for kind in KINDS),
    *((kind, {"kind": "partial", "blocks": 0, "biases": True, "head": "shared"}) for kind in KINDS),
    ("bert", {"kind": "partial", "blocks": 2, "norms": True, "biases": True, "head": "local"}),
    ("gpt2", {"kind": "partial", "blocks": 1, "biases": True, "head": "frozen"}),
    *((kind, {"dora": True}) for kind in ("vit", "resnet", "bert", "gpt2", "llama")),
    ("vit", {"rslora": True, "rank": 4}),
    ("bert", {"rslora": True, "dora": True}),
    ("vit", {"head": "frozen"}),
    ("vit", {"head": "local"}),
    ("deep-vit", {"targets": ["projection"]}),  # whose weight the model's own code looks at
    ("resnet", {"rank": 1, "alpha": 3.0, "head": "frozen"}),
]
each_method = pytest.mark.parametrize(("kind", "method"), thinned(EVERY, 3), ids=repr)


@torch.inference_mode()
def peft_logits(stack: Stack, vector: Vector, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What peft's model computes with the same adapter."""
    stack.bench.put((stack.bench.layout, vector))
    logits: torch.Tensor = stack.bench.model(**inputs).logits.clone()
    stack.bench.put()
    return logits


@each_method
def test_one_site_computes_what_pefts_model_does(kind: str, method: dict[str, Any]) -> None:
    stack, inputs = open_small(kind, **method), as_tensors(rows_for(kind, 9).batch(np.arange(9)))
    for vector in (stack.bench.initial, noisy(stack.bench)):
        stack.put_one(stack.bench.layout, vector)
        with torch.inference_mode():
            ours = stack.logits(inputs)
        assert ours.dtype == torch.float32
        wanted = peft_logits(stack, vector, inputs)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    first = peft_logits(stack, stack.bench.initial, inputs)
    assert (first - wanted).abs().max() > 1e-3  # it does matter what is put


@each_method
def test_sites_side_by_side_compute_what_each_does(kind: str, method: dict[str, Any]) -> None:
    stack = open_small(kind, **method)
    rows = [rows_for(kind, 5, seed) for seed in (1, 2, 3)]
    width = max(one.width(np.arange(5)) for one in rows)
    batches = [as_tensors(one.batch(np.arange(5), width)) for one in rows]
    vectors = [noisy(stack.bench, seed=seed) for seed in range(3)]
    stack.put(stack.bench.layout, torch.from_numpy(np.stack(vectors)))
    with torch.inference_mode():
        together = stack.logits({k: torch.cat([b[k] for b in batches]) for k in batches[0]})
    pairs = zip(vectors, batches, strict=True)
    alone = torch.cat([peft_logits(stack, vector, batch) for vector, batch in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_tensors_that_are_not_put_are_initial() -> None:
    stack, inputs = open_small("bert"), as_tensors(texts(6).batch(np.arange(6)))
    layout, vector = stack.bench.layout, noisy(stack.bench)
    part = layout.only(name for name in layout.names if not is_factor_a(name))
    stack.put_one(layout, noisy(stack.bench, seed=3))
    stack.put_one(part, layout.part(vector, part))
    whole = layout.merged(stack.bench.initial, (part, layout.part(vector, part)))
    with torch.inference_mode():
        ours = stack.logits(inputs)
    torch.testing.assert_close(ours, peft_logits(stack, whole, inputs), rtol=0, atol=1e-5)


def test_views_come_in_the_order_of_the_layout() -> None:
    stack = open_small("vit")
    layout = stack.bench.layout
    flat = torch.arange(2 * layout.size, dtype=torch.float32).view(2, -1)
    views = stack.put(layout, flat)
    assert torch.equal(torch.cat([view.reshape(2, -1) for view in views], 1), flat)
    assert all(view.data_ptr() >= flat.data_ptr() for view in views)
    flat.zero_()
    assert not any(view.any() for view in views)  # views, not copies


# The twin


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tensors_are_shared_with_pefts_model(kind: str) -> None:
    stack = open_small(kind)
    theirs = {value.data_ptr() for value in stack.bench.model.get_base_model().parameters()}
    ours = dict(stack.model.named_parameters())
    frozen = [name for name in ours if "classifier" not in name and "score" not in name]
    assert len(frozen) > 3
    assert all(ours[name].data_ptr() in theirs for name in frozen)
    assert not any(value.requires_grad for value in ours.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_pefts_model_is_as_before(kind: str, precision: str) -> None:
    plain = open_stack(make_job(kind))
    bench = plain.bench
    inputs = as_tensors(rows_for(kind, 8).batch(np.arange(8)))
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    logits = peft_logits(plain, noisy(bench), inputs)
    stack = open_stack(make_job(kind, training={"precision": precision}))
    assert stack.bench is bench
    trained(stack, rows_for(kind, 24), settings(epochs=2, dropout=0.2))
    after = bench.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(peft_logits(stack, noisy(bench), inputs), logits)


def test_bf16_is_of_the_frozen_layers_and_not_of_batch_norm() -> None:
    stack = open_small("resnet", precision="bf16")
    kinds = {
        isinstance(module, nn.BatchNorm2d): parameter.dtype
        for module in stack.model.modules()
        for parameter in module.parameters(recurse=False)
    }
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert stack.dtype == torch.bfloat16
    stack.put_one(stack.bench.layout, noisy(stack.bench))
    assert stack.logits(as_tensors(digits(4).batch(np.arange(4)))).dtype == torch.float32


def test_the_same_backbone_and_method_are_the_same_stack() -> None:
    assert open_small("vit") is open_small("vit")
    assert open_small("vit") is not open_small("vit", precision="bf16")
    assert open_small("vit") is not open_small("vit", rank=1)


STRANGE: dict[str, tuple[Any, str]] = {
    "ia3": (peft.IA3Config(target_modules=["2"], feedforward_modules=[]), "ia3.layer.Linear"),
    "vera": (peft.VeraConfig(target_modules=["2"]), "vera.layer.Linear"),
    "oft": (peft.OFTConfig(target_modules=["2"], r=0, oft_block_size=4), "oft.layer.Linear"),
    "embedding": (peft.LoraConfig(target_modules=["0"]), "lora.layer.Embedding"),
    "conv1d": (peft.LoraConfig(target_modules=["1"]), "lora.layer.Conv1d"),
    "bias of B": (peft.LoraConfig(target_modules=["2"], lora_bias=True), "lora_B.bias"),
    "prompt": (peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=8,
        num_layers=1, num_attention_heads=1, num_transformer_submodules=1), "prompt_encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_a_layer_without_a_twin_is_refused_by_its_kind(kind: str) -> None:
    config, named = STRANGE[kind]
    layers = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    if kind == "prompt":
        model: Any = nn.Module()
        model.prompt_encoder = nn.Linear(2, 8)
        names = ["prompt_encoder.weight"]
    else:
        model = peft.get_peft_model(layers, config)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        model = model.get_base_model()
    assert names
    with pytest.raises(AdapterError, match=f"no way to train .*{named}") as caught:
        owners = [trained_tensor(model, name) for name in names]
        (owner,) = {owner for owner, _ in owners}
        stacked_module(model.get_submodule(owner), {one for _, one in owners}, Randomness())
    assert caught.value.hint


class Beside(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of a method to come, whose adapter is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.beside = nn.Linear(64, 64), nn.ModuleDict({"a": nn.Linear(64, 64)})


def test_only_frozen_layers_are_quantised_whatever_peft_puts_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(nn=None))
    monkeypatch.setattr(quantization, "_quantized", lambda layer, *rest: layer)
    monkeypatch.setattr(quantization, "head_names", lambda model: ())
    model = nn.Sequential(Beside())
    found = quantization.quantized_layers(model, 8, torch.device("cpu"), torch.float32)
    assert list(found.values()) == [model[0].base_layer]


class Scaled(Stacked):
    """The twin of an (IA)3 layer, for the test alone."""

    trains = ("ia3_l",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply each output by the site's factor."""
        factors = self.values["ia3_l"].flatten(1)  # [K, out]
        result: torch.Tensor = self.base(x)
        rows = result.view(len(factors), -1, result.shape[-1])
        return (rows * factors[:, None]).view_as(result)


def test_a_row_of_twins_is_all_that_a_new_kind_of_layer_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ia3(self: LoraMethod, model: Any, anatomy: Any) -> Any:
        return peft.IA3Config(
            target_modules=["q_proj", "fc1"], feedforward_modules=[], modules_to_save=["classifier"]
        )

    monkeypatch.setattr(LoraMethod, "peft_config", ia3)
    monkeypatch.setitem(TWINS, Ia3Linear, lambda layer, trains, random: Scaled(layer.base_layer))
    close_backbone()
    try:
        inputs = as_tensors(digits(9).batch(np.arange(9)))
        stack = open_stack(make_job("vit"))
        assert any(name.endswith("ia3_l.default") for name in stack.bench.layout.names)
        vectors = [noisy(stack.bench, seed=seed) for seed in range(2)]
        wanted = [peft_logits(stack, vector, inputs) for vector in vectors]
        stack.put(stack.bench.layout, torch.from_numpy(np.stack(vectors)))
        with torch.inference_mode():
            ours = stack.logits({key: torch.cat([value] * 2) for key, value in inputs.items()})
        torch.testing.assert_close(ours, torch.cat(wanted), rtol=0, atol=1e-5)
    finally:
        close_backbone()


# What cannot be stacked


def describe(folder: Path) -> None:
    """A tokenizer that knows two words."""
    words = {"[PAD]": 0, "[UNK]": 1}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def deberta(folder: Path, targets: Any) -> Stack:
    """A model whose layers project one table of relative positions for all rows."""
    transformers.DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, initializer_range=0.3,
    ).save_pretrained(folder)  # fmt: skip
    describe(folder)
    raw = {
        "job": {"name": "t", "task": "text-classification", "labels": list("0123456789")},
        "backbone": {"source": f"path:{folder}", "weights": "random"},
        "method": {**LORA, "targets": targets},
    }
    return open_stack(parse_job(raw, where="test"))


def swin(folder: Path) -> Stack:
    """A model with a layer over a table of coordinates, an odd number of them."""
    transformers.Swinv2Config(
        image_size=8, patch_size=2, num_channels=1, embed_dim=8, depths=[1], num_heads=[2],
        window_size=2,
    ).save_pretrained(folder)  # fmt: skip
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": list("0123456789")},
        "backbone": {"source": f"path:{folder}", "weights": "random"},
        "method": {**LORA, "targets": "all-linear"},
    }
    return open_stack(parse_job(raw, where="test"))


@each_method
def test_what_has_a_batch_dimension_everywhere_can_be_stacked(
    kind: str, method: dict[str, Any]
) -> None:
    stack = open_small(kind, **method)
    check_stacking(stack, as_tensors(rows_for(kind, 8).batch(np.arange(8))))


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_bf16_can_be_stacked(kind: str) -> None:
    check_stacking(
        open_small(kind, precision="bf16"), as_tensors(rows_for(kind, 8).batch(np.arange(8)))
    )


def test_a_table_for_all_rows_cannot_be_adapted_by_site(tmp_path: Path) -> None:
    inputs = as_tensors(texts(8).batch(np.arange(8)))
    with pytest.raises(InputError, match="rows would mix") as caught:
        check_stacking(deberta(tmp_path, ["pos_key_proj"]), inputs)
    assert "sites_per_pass = 1" in caught.value.hint
    check_stacking(deberta(tmp_path, ["query_proj"]), inputs)  # beside it, others can


def test_a_table_that_cannot_even_be_cut_is_refused_in_the_same_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows would mix"):
        check_stacking(swin(tmp_path), as_tensors(digits(8).batch(np.arange(8))))


def test_rows_that_mix_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, inputs = open_small("vit"), as_tensors(digits(8).batch(np.arange(8)))
    (module, _), *_ = stack.modules.values()
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda x: forward(x).roll(1, 0))
    with pytest.raises(InputError, match="rows would mix"):
        check_stacking(stack, inputs)
