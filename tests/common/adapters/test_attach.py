"""What trains, and how it becomes one vector: counted, ordered, written and read exactly."""

import copy
import hashlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
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

from fedgraft.common.adapters.attach import adapter_layout, attach, read, write
from fedgraft.common.backbones.load import find_backbone, load
from fedgraft.common.config.job import Job
from fedgraft.common.errors import AdapterError
from fedgraft.common.layout import Layout, Vector, is_factor_a, is_head

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

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


@pytest.fixture(scope="module")
def bench(folders: dict[str, str]) -> Bench:
    return Bench(folders)


@pytest.fixture(scope="module")
def bert(bench: Bench) -> PeftModel:
    """A small adapter on BERT; its values may be overwritten."""
    return bench.adapted("bert", targets=["query", "value"])


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


# --- the layout


def test_the_order_is_factors_a_then_factors_b_then_heads_each_by_name(bench: Bench) -> None:
    names = adapter_layout(bench.adapted("bert")).names
    kinds = [2 if is_head(name) else 0 if is_factor_a(name) else 1 for name in names]
    assert set(kinds) == {0, 1, 2}
    assert [*zip(kinds, names, strict=True)] == sorted(zip(kinds, names, strict=True))


def test_a_layout_names_every_trainable_parameter_with_its_shape(bench: Bench) -> None:
    model = bench.adapted("vit", targets=["all-conv", "all-linear"])
    layout = adapter_layout(model)
    shapes = {name: tuple(p.shape) for name, p in trainable(model).items()}
    assert dict(zip(layout.names, layout.shapes, strict=True)) == shapes
    assert layout.size == sum(p.numel() for p in trainable(model).values())


LAYOUT = Layout(("a", "b", "c", "d"), ((2, 3), (4,), (), (0, 5)))


def test_slices_lie_end_to_end() -> None:
    assert LAYOUT.size == 11
    expected = {"a": slice(0, 6), "b": slice(6, 10), "c": slice(10, 11), "d": slice(11, 11)}
    assert LAYOUT.slices == expected
    assert Layout((), ()).slices == {}
    assert Layout((), ()).size == 0


def test_the_fingerprint_is_known_and_sees_names_shapes_and_order() -> None:
    expected = hashlib.sha256(b"a (2, 3)\nb (4,)\nc ()\nd (0, 5)\n").hexdigest()
    assert LAYOUT.fingerprint == expected
    variants = [
        LAYOUT,
        Layout(("a", "b", "c", "e"), LAYOUT.shapes),
        Layout(LAYOUT.names, ((3, 2), (4,), (), (0, 5))),
        Layout(LAYOUT.names[::-1], LAYOUT.shapes[::-1]),
        Layout(LAYOUT.names[:3], LAYOUT.shapes[:3]),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_two_loads_have_one_layout_and_other_methods_have_another(bench: Bench) -> None:
    def mark(**method: Any) -> str:
        return adapter_layout(bench.adapted("bert", **method)).fingerprint

    assert mark() == mark()
    others: list[dict[str, Any]] = [
        {"rank": 4},
        {"targets": ["query"]},
        {"head": "frozen"},
        {"kind": "head"},
    ]
    assert mark() not in {mark(**method) for method in others}
    assert mark() == mark(alpha=99, head="local")


def test_only_keeps_the_order_of_the_layout() -> None:
    kept = LAYOUT.only(["c", "a", "c"])
    assert kept == Layout(("a", "c"), ((2, 3), ()))
    assert LAYOUT.only(iter(LAYOUT.names)) == LAYOUT
    assert LAYOUT.only([]) == Layout((), ())


def test_only_refuses_names_it_does_not_know() -> None:
    with pytest.raises(AdapterError, match="2 adapter tensors are unknown here, such as x"):
        LAYOUT.only(["a", "y", "x"])


# --- reading and writing


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_was_written_is_read_bit_for_bit(bert: PeftModel, data: st.DataObject) -> None:
    layout = adapter_layout(bert)
    vector: Vector = data.draw(
        hnp.arrays(np.float32, layout.size, elements=st.floats(width=32, allow_nan=False))
    )
    write(bert, layout, vector)
    assert read(bert, layout).tobytes() == vector.tobytes()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_writing_a_part_leaves_the_rest(bert: PeftModel, data: st.DataObject) -> None:
    layout = adapter_layout(bert)
    part = layout.only(data.draw(st.sets(st.sampled_from(layout.names))))
    before, new = some_vector(layout, 1), some_vector(part, 2)
    write(bert, layout, before)
    write(bert, part, new)
    expected = before.copy()
    for name, where in part.slices.items():
        expected[layout.slices[name]] = new[where]
    assert np.array_equal(read(bert, layout), expected)
    assert np.array_equal(read(bert, part), new)


def test_every_tensor_gets_its_own_slice_in_row_major_order(bert: PeftModel) -> None:
    layout = adapter_layout(bert)
    write(bert, layout, np.arange(layout.size, dtype=np.float32))
    parameters = dict(bert.named_parameters())
    for name, where in layout.slices.items():
        expected = torch.arange(where.start, where.stop, dtype=torch.float32)
        assert torch.equal(parameters[name].detach().reshape(-1), expected)


def test_the_vector_read_is_a_copy(bert: PeftModel) -> None:
    layout = adapter_layout(bert)
    vector = some_vector(layout)
    write(bert, layout, vector)
    before = read(bert, layout)
    write(bert, layout, np.zeros(layout.size, np.float32))
    assert np.array_equal(before, vector)
    vector[:] = 7
    assert not read(bert, layout).any()


def test_writing_needs_no_gradient_and_keeps_none(bert: PeftModel) -> None:
    layout = adapter_layout(bert)
    write(bert, layout, some_vector(layout))
    for parameter in trainable(bert).values():
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter.grad_fn is None


def test_a_vector_that_is_read_only_or_has_gaps_can_be_written(bert: PeftModel) -> None:
    layout = adapter_layout(bert)
    wide = np.repeat(some_vector(layout), 2)
    wide.flags.writeable = False
    write(bert, layout, wide[::2])
    assert np.array_equal(read(bert, layout), wide[::2])


def test_half_precision_parameters_are_read_as_float32(bench: Bench) -> None:
    model = bench.adapted("bert", targets=["query"])
    layout = adapter_layout(model)
    write(model, layout, some_vector(layout))
    expected = {n: p.detach().bfloat16().float() for n, p in trainable(model).items()}
    vector = read(model.to(torch.bfloat16), layout)
    assert vector.dtype == np.float32
    for name, where in layout.slices.items():
        assert np.array_equal(vector[where], expected[name].numpy().reshape(-1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v[:-1],
        lambda v: np.append(v, np.float32(0)),
        lambda v: v[:0],
        lambda v: v[None],
        lambda v: v.astype(np.float64),
        lambda v: v.astype(np.float16),
        lambda v: v.astype(np.int32),
        lambda v: v.astype(">f4"),
    ],
    ids=["short", "long", "empty", "matrix", "float64", "float16", "int32", "big-endian"],
)
def test_a_vector_of_another_length_or_type_is_refused_before_anything_is_written(
    bert: PeftModel, spoil: Callable[[Vector], NDArray[Any]]
) -> None:
    layout = adapter_layout(bert)
    before = some_vector(layout, 5)
    write(bert, layout, before)
    with pytest.raises(AdapterError, match=rf"not float32 \[{layout.size}\]") as caught:
        write(bert, layout, spoil(before + np.float32(1)))
    assert caught.value.hint
    assert np.array_equal(read(bert, layout), before)


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
