"""Activations are kept only where it is proved that they change nothing, each under its own key."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.contract_tasks import TaskCase
from support.matrix import tries
from support.trainings import TOP, digits, noisy, open_small, rows_for, texts

from fedgraft.client.data.cache import Arrays, Store
from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.model.cut import Prefix
from fedgraft.client.model.forward import compute, open_feed
from fedgraft.client.objectives import OBJECTIVES
from fedgraft.common.examples import Examples, ImageExamples
from fedgraft.common.tasks import TASKS


def prefix_of(stack: Stack, examples: Examples) -> Prefix | None:
    """The prefix, sought anew."""
    stack.prefixes.clear()
    return open_feed(stack, stack.bench.layout, examples, None).prefix


def activations(prefix: Prefix, examples: Examples, index: NDArray[np.int64]) -> torch.Tensor:
    units = int(np.asarray(examples.lengths)[index].sum()) if prefix.by_token else len(index)
    out = prefix.unit.new_empty(units, *prefix.unit.shape[1:])
    compute(prefix, examples, index, out)
    return out


# The proof


def test_a_layer_whose_rows_depend_on_each_other_has_no_prefix() -> None:
    stack = open_small("bert", targets=TOP["bert"])
    assert prefix_of(stack, texts(10)) is not None
    layer = stack.model.get_submodule("bert.encoder.layer.0")

    def mix(module: object, args: object, output: Any) -> Any:
        return output + 1e-3 * output.sum(0, keepdim=True)

    handle = layer.register_forward_hook(mix)
    assert prefix_of(stack, texts(10)) is None
    handle.remove()
    stack.prefixes.clear()


def test_a_layer_that_looks_at_padding_has_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = open_small("bert", targets=TOP["bert"])
    layer = stack.model.get_submodule("bert.encoder.layer.2")
    forward = layer.forward

    def look(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        return forward(hidden + 1e-3 * hidden.sum(1, keepdim=True), *args, **options)

    monkeypatch.setattr(layer, "forward", look)
    assert prefix_of(stack, texts(10)) is None
    stack.prefixes.clear()


def test_a_model_that_goes_back_to_a_lower_layer_has_no_prefix() -> None:
    """What is passed over cannot be skipped to from further up."""
    stack = open_small("deep-vit", targets=TOP["deep-vit"])
    assert prefix_of(stack, digits(10)) is not None
    seen: list[torch.Tensor] = []
    first, last = (stack.model.get_submodule(f"vit.layers.{n}") for n in (0, 3))

    def enter(module: object, args: object) -> None:
        seen.clear()

    def leave(module: object, args: object, output: Any) -> None:
        seen.append(output)

    def add(module: object, args: object, output: Any) -> Any:
        return output + seen[0] if seen else output

    handles = [
        stack.model.register_forward_pre_hook(enter),
        first.register_forward_hook(leave),
        last.register_forward_hook(add),
    ]
    assert prefix_of(stack, digits(10)) is None
    for handle in handles:
        handle.remove()
    stack.prefixes.clear()


def test_a_container_that_is_walked_in_another_way_has_no_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = open_small("deep-vit", targets=TOP["deep-vit"])

    def fail(self: object, *args: object, **options: object) -> None:
        raise TypeError("no place for another kind of layer")

    monkeypatch.setattr("fedgraft.client.model.frozen_prefix._PassedOver.forward", fail)
    assert prefix_of(stack, digits(10)) is None
    stack.prefixes.clear()


def spoilt() -> ImageExamples:
    """Rows of which the first is not finite."""
    rows = digits(12)
    pixels = rows.values.copy()
    pixels[0] = np.nan
    return ImageExamples(rows.labels, pixels, rows.rows)


FIRST: Mapping[str, Callable[[], Examples]] = {
    "one": lambda: digits(1),
    "many": lambda: digits(100),
    "twice the same": lambda: digits(4).subset(np.array([1, 1, 1])),
    "not finite": spoilt,
}


@pytest.mark.parametrize("first", FIRST)
def test_whoever_comes_first_decides_nothing(first: str) -> None:
    """In another process another site is first, and the results must be the same bytes."""
    stack = open_small("vit", targets=["layers.2.attention.q_proj"])
    assert prefix_of(stack, FIRST[first]()) is not None
    stack.prefixes.clear()


@pytest.mark.parametrize("longest", [1, 3, 40])
def test_however_long_the_first_texts_are_the_prefix_is_the_same(longest: int) -> None:
    stack = open_small("bert", targets=TOP["bert"])
    found = prefix_of(stack, texts(5, longest=longest))
    assert found is not None and found.by_token
    stack.prefixes.clear()


# Any company


KEPT: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"targets": TOP[kind]}) for kind in TOP),
    ("vit", {"targets": ["layers.2.attention.q_proj"]}),
    ("vit", {"kind": "head"}),
    ("bert", {"kind": "head"}),
    ("resnet", {"kind": "head"}),
]


@given(
    case=st.sampled_from(KEPT),
    precision=st.sampled_from(["fp32", "bf16"]),
    size=st.integers(1, 90),
    seed=st.integers(0, 99),
)
@limits(max_examples=tries(40), deadline=None, derandomize=True)
def test_an_example_has_the_same_activations_in_any_company(
    case: tuple[str, dict[str, Any]], precision: str, size: int, seed: int
) -> None:
    kind, method = case
    stack, examples = open_small(kind, precision=precision, **method), rows_for(kind, 90)
    prefix = open_feed(stack, stack.bench.layout, examples, None).prefix
    assert prefix is not None
    every = activations(prefix, examples, np.arange(90))
    index = np.random.default_rng(seed).integers(0, 90, size)
    lengths = np.asarray(examples.lengths) if prefix.by_token else np.ones(90, np.int64)
    starts = np.cumsum(lengths) - lengths
    wanted = torch.cat([every[starts[i] : starts[i] + lengths[i]] for i in index])
    assert torch.equal(activations(prefix, examples, index), wanted)
    part = examples.subset(index)
    assert torch.equal(activations(prefix, part, np.arange(size)), wanted)


HEADS = {"label": "text-classification", "number": "text-regression"}
"""A task of each target with a head that can be cut off."""


@pytest.mark.parametrize("target", OBJECTIVES)
def test_a_head_that_trains_alone_is_what_is_cut_off(target: str, tmp_path: Path) -> None:
    able = [name for name, one in TASKS.items() if one.target == target and one.head_alone]
    if target not in HEADS:  # the outputs at padding differ, or no head trains alone
        assert able in ([], ["token-classification"])
        return
    case = TaskCase(HEADS[target], tmp_path)
    assert case.task.name in able
    stack = open_stack(case.ask({"method": {"kind": "head"}}))
    rows = read_split(str(tmp_path / "sites" / "ash" / "train" / "rows.jsonl"), case.job).dataset
    examples = encode(rows, stack.bench.processor, case.job, store=None, key="")
    prefix = prefix_of(stack, examples)
    assert prefix is not None
    assert not prefix.whole  # no layer of the body computes again
    assert not prefix.by_token  # one vector is kept of each row


def test_adapters_above_the_cut_have_no_say_in_what_is_kept() -> None:
    stack, examples = open_small("bert", targets=TOP["bert"]), texts(20)
    prefix, index = prefix_of(stack, examples), np.arange(20)
    assert prefix is not None
    first = activations(prefix, examples, index)
    stack.put_one(stack.bench.layout, noisy(stack.bench))
    assert torch.equal(activations(prefix, examples, index), first)
    flat = torch.from_numpy(np.stack([noisy(stack.bench, seed=seed) for seed in range(3)]))
    stack.put(stack.bench.layout, flat)
    assert torch.equal(activations(prefix, examples, index), first)


# Keys


class Recording(Store):
    """A store that remembers what it was asked for, and what was made of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, memory=10**9, disk=0)
        self.asked: dict[str, bytes] = {}

    def get(self, key: str, make: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        arrays = Arrays(make())
        content = arrays["hidden"].tobytes()
        assert self.asked.setdefault(key, content) == content  # never another content
        return arrays


def test_whatever_makes_other_activations_has_another_key(tmp_path: Path) -> None:
    store = Recording(tmp_path)
    top: dict[str, Any] = {"targets": TOP["bert"]}
    stacks = [
        open_small("bert", **top),
        open_small("bert", targets=["layer.1.attention.self.query"]),
        open_small("bert", kind="head"),
        open_small("bert", precision="bf16", **top),
        open_small("bert", seed=1, **top),  # other weights: they are drawn from it
        open_small("roberta", targets=["layer.2.attention.self.query"]),
    ]
    data = [texts(20), texts(20, seed=2), texts(20).subset(np.arange(20)[::-1]), texts(19)]
    for stack in stacks:
        for examples in data:
            open_feed(stack, stack.bench.layout, examples, store)
    assert len(store.asked) == len(stacks) * len(data)


def test_what_makes_the_same_activations_shares_them(tmp_path: Path) -> None:
    store = Recording(tmp_path)
    top: dict[str, Any] = {"targets": TOP["bert"]}
    relabelled = texts(20)
    relabelled.labels[:] = 0
    for method in (top, {**top, "rank": 1}, {**top, "head": "local"}, {**top, "alpha": 3.0}):
        stack = open_small("bert", **method)
        for examples in (texts(20), relabelled):
            open_feed(stack, stack.bench.layout, examples, store)
    assert len(store.asked) == 1


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_version_of_a_library_has_another_key(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, store = open_small("bert", targets=TOP["bert"]), Recording(tmp_path)
    for version in ("1.0", "2.0"):
        monkeypatch.setattr(f"{library}.__version__", version)
        stack.prefixes.clear()
        open_feed(stack, stack.bench.layout, texts(20), store)
    stack.prefixes.clear()
    assert len(store.asked) == 2
