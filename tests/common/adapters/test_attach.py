"""What trains: counted on four architectures, and nothing of the backbone among it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.tiny_backbones import RANK, Bench, factors, logits, some_vector, trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgraft.common.adapters.attach import adapter_layout, attach, read, write
from fedgraft.common.errors import AdapterError
from fedgraft.common.layout import Vector, is_factor_a, is_head

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


# --- attaching

CHOICES: list[tuple[str, Any, Callable[[str, nn.Module], bool]]] = [
    ("bert", "all-linear", lambda name, m: isinstance(m, nn.Linear)),
    ("vit", "all-linear", lambda name, m: isinstance(m, nn.Linear)),
    ("vit", "all-conv", lambda name, m: isinstance(m, nn.Conv2d)),
    ("gpt2", "all-linear", lambda name, m: isinstance(m, Conv1D)),
    ("resnet", "all-conv", lambda name, m: isinstance(m, nn.Conv2d)),
    ("convnext", "all-conv", lambda name, m: isinstance(m, nn.Conv2d) and m.groups == 1),
    ("bert", ["query", "value"], lambda name, m: name.endswith((".query", ".value"))),
    ("bert", ["attention.output.dense"], lambda name, m: name.endswith("attention.output.dense")),
    ("bert", ["layer.1.output.dense"], lambda name, m: name.endswith("layer.1.output.dense")),
    ("gpt2", ["c_attn"], lambda name, m: name.endswith(".c_attn")),
    ("vit", ["all-conv", "q_proj"], lambda name, m: name.endswith(("projection", ".q_proj"))),
    (
        "convnext",
        ["all-conv", "all-linear"],
        lambda name, m: isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1),
    ),
]


@pytest.mark.parametrize(
    ("name", "targets", "wanted"),
    CHOICES,
    ids=[f"{name}-{targets}" for name, targets, _ in CHOICES],
)
def test_exactly_the_targeted_modules_get_factors(
    bench: Bench, name: str, targets: Any, wanted: Callable[[str, nn.Module], bool]
) -> None:
    backbone = bench.backbone(name)
    modules = {
        path: module
        for path, module in backbone.named_modules()
        if not path.startswith(("classifier", "score")) and wanted(path, module)
    }
    assert modules
    expected = sum(factors(module, RANK) for module in modules.values())

    layout = adapter_layout(attach(backbone, bench.job(name, targets=targets, head="frozen")))
    assert layout.size == expected
    adapted = {path.split(".lora_")[0].removeprefix("base_model.model.") for path in layout.names}
    assert adapted == set(modules)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "vit"])
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_the_head_trains_unless_it_is_frozen(bench: Bench, name: str, head: str) -> None:
    targets = "all-conv" if name == "resnet" else "all-linear"
    backbone = bench.backbone(name)
    head_module = "score" if name == "gpt2" else "classifier"
    size = sum(p.numel() for p in backbone.get_submodule(head_module).parameters())
    layout = adapter_layout(attach(backbone, bench.job(name, targets=targets, head=head)))
    heads = layout.only(path for path in layout.names if is_head(path))
    assert heads.size == (0 if head == "frozen" else size)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "vit"])
def test_the_head_method_trains_the_head_and_nothing_else(bench: Bench, name: str) -> None:
    layout = adapter_layout(bench.adapted(name, kind="head"))
    assert layout.names
    assert all(is_head(path) for path in layout.names)
    labels, width = (10, 96) if name == "vit" else (3, {"bert": 32, "gpt2": 16, "resnet": 12}[name])
    assert layout.size == labels * width + (0 if name == "gpt2" else labels)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", {}),
        ("gpt2", {}),
        ("vit", {"targets": ["all-conv", "all-linear"]}),
        ("resnet", {"targets": "all-conv"}),
        ("resnet", {"targets": "all-conv", "head": "frozen"}),
        ("bert", {"kind": "head"}),
    ],
)
def test_no_parameter_of_the_backbone_trains_or_changes(
    bench: Bench, name: str, method: dict[str, Any]
) -> None:
    backbone = bench.backbone(name)
    before = copy.deepcopy(backbone.state_dict())
    model = attach(backbone, bench.job(name, **method))
    assert trainable(model)
    assert all("lora_" in path or is_head(path) for path in trainable(model))
    write(model, adapter_layout(model), some_vector(adapter_layout(model)))
    after = model.state_dict()
    for path, value in before.items():
        *module, leaf = path.split(".")
        candidates = [
            f"base_model.model.{'.'.join([*module, extra, leaf])}".replace("..", ".")
            for extra in ("", "base_layer", "original_module")
        ]
        head = f"base_model.model.{module[0]}.original_module.{'.'.join([*module[1:], leaf])}"
        found = [after[key] for key in (*candidates, head) if key in after]
        assert found, path
        assert all(torch.equal(other, value) for other in found)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", {"alpha": 64}),
        ("gpt2", {}),
        ("vit", {"targets": ["all-linear", "all-conv"], "dropout": 0.5}),
        ("resnet", {"targets": "all-conv"}),
        ("vit", {"kind": "head"}),
    ],
)
def test_a_fresh_adapter_leaves_every_logit_bit_for_bit_as_it_was(
    bench: Bench, name: str, method: dict[str, Any]
) -> None:
    backbone = bench.backbone(name)
    expected = logits(backbone, name)
    assert torch.equal(logits(attach(backbone, bench.job(name, **method)), name), expected)


def test_alpha_over_rank_scales_the_update(bench: Bench) -> None:
    def moved(alpha: float) -> torch.Tensor:
        model = bench.adapted("bert", targets=["layer.1.output.dense"], alpha=alpha, head="frozen")
        update = model.get_submodule("base_model.model.bert.encoder.layer.1.output.dense")
        layout = adapter_layout(model)
        write(model, layout, some_vector(layout))
        with torch.no_grad():
            ones = torch.ones(1, 48)
            difference: torch.Tensor = update(ones) - update.get_submodule("base_layer")(ones)
        return difference

    torch.testing.assert_close(moved(4 * RANK), 4 * moved(RANK), rtol=1e-4, atol=1e-5)
    assert moved(RANK).abs().max() > 0.1


def test_the_initial_adapter_depends_on_the_jobs_seed_and_nothing_else(bench: Bench) -> None:
    def initial(seed: int, state: int) -> Vector:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            model = attach(bench.backbone("bert"), bench.job("bert", seed=seed))
        return read(model, adapter_layout(model))

    assert np.array_equal(initial(0, 1), initial(0, 2))
    assert not np.array_equal(initial(0, 1), initial(1, 1))


def test_factors_b_start_at_zero_and_factors_a_do_not(bench: Bench) -> None:
    model = bench.adapted("bert", head="frozen")
    layout = adapter_layout(model)
    vector = read(model, layout)
    for path, where in layout.slices.items():
        assert vector[where].any() == is_factor_a(path)


def test_attaching_leaves_the_global_generator_alone(bench: Bench) -> None:
    backbone = bench.backbone("bert")
    before = torch.get_rng_state()
    attach(backbone, bench.job("bert"))
    assert torch.equal(torch.get_rng_state(), before)


# --- targets that match nothing


@pytest.mark.parametrize(
    ("name", "targets", "bad", "hint"),
    [
        ("bert", ["qeury"], "qeury", "did you mean 'query'?"),
        ("bert", ["query", "vlaue"], "vlaue", "did you mean 'value'?"),
        ("bert", ["uery"], "uery", "did you mean 'query'?"),
        ("vit", ["q_prj"], "q_prj", "did you mean 'q_proj'?"),
        ("bert", ["zzz"], "zzz", "it has: dense, key, query, value"),
        ("bert", "all-conv", "all-conv", "it has: dense, key, query, value"),
        ("resnet", "all-linear", "all-linear", "it has: convolution"),
        ("bert", ["classifier"], "classifier", "it has: dense, key, query, value"),
        ("bert", ["LayerNorm"], "LayerNorm", "it has: dense, key, query, value"),
        ("bert", ["layer.9.output.dense"], "layer.9.output.dense", "dense"),
        ("convnext", ["dwconv"], "dwconv", ""),
        ("bert", [""], "", ""),
    ],
)
def test_a_target_that_matches_nothing_names_what_there_is(
    bench: Bench, name: str, targets: Any, bad: str, hint: str
) -> None:
    with pytest.raises(AdapterError) as caught:
        bench.adapted(name, targets=targets)
    assert str(caught.value) == f"method.targets: {bad!r} matches no module of this backbone"
    assert hint in caught.value.hint


# --- peft folders


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", {}),
        ("bert", {"targets": ["query"], "head": "frozen"}),
        ("gpt2", {}),
        ("vit", {"targets": ["all-conv", "all-linear"]}),
        ("resnet", {"targets": "all-conv"}),
        ("vit", {"kind": "head"}),
    ],
)
def test_a_saved_peft_folder_brings_the_adapter_back_on_a_fresh_backbone(
    bench: Bench, tmp_path: Path, name: str, method: dict[str, Any]
) -> None:
    model = bench.adapted(name, **method)
    layout = adapter_layout(model)
    untouched = logits(model, name)
    vector = some_vector(layout) * np.float32(0.1)
    write(model, layout, vector)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    back = PeftModel.from_pretrained(bench.backbone(name), tmp_path)
    assert np.array_equal(read(back, layout), vector)
    assert torch.equal(logits(back, name), logits(model, name))
    assert not torch.equal(logits(back, name), untouched)
