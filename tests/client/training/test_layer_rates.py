"""Rates by depth: what is lower goes slower and later, and what stands does not move at all."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.companies import Company, uneven
from support.matrix import thinned
from support.trainings import (
    KINDS,
    LORA,
    book,
    felt,
    noisy,
    open_small,
    rows_for,
    settings,
    trained,
)

from fedgraft.client.training.layer_rates import Pace, open_pace
from fedgraft.client.training.trainer import Span
from fedgraft.common.backbones.blocks import blocks_in, depths
from fedgraft.common.layout import OUTER, is_head

PARTIAL: dict[str, Any] = {"kind": "partial", "blocks": 2, "head": "shared"}
BLOCKS = {
    "vit": [f"vit.layers.{i}" for i in range(3)],
    "deep-vit": [f"vit.layers.{i}" for i in range(4)],
    "bert": [f"bert.encoder.layer.{i}" for i in range(3)],
    "roberta": [f"roberta.encoder.layer.{i}" for i in range(3)],
    "gpt2": [f"transformer.h.{i}" for i in range(3)],
    "llama": [f"model.layers.{i}" for i in range(3)],
    "resnet": [f"resnet.encoder.stages.{i}" for i in range(2)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_counted_from_the_top(kind: str) -> None:
    bench = open_small(kind).bench
    model = bench.model.get_base_model()
    assert list(blocks_in(model))[-4:] == BLOCKS[kind][-4:]
    assert len(blocks_in(model)) == len(BLOCKS[kind])
    every = [name for name, _ in model.named_parameters()]
    found = dict(zip(every, depths(model, every), strict=True))
    for place, block in enumerate(reversed(BLOCKS[kind]), start=1):
        assert {d for n, d in found.items() if n.startswith(f"{block}.")} == {place}
    heads = [n.removeprefix(OUTER) for n in bench.layout.names if is_head(n)]
    assert heads and {found[name] for name in heads} == {0}
    below = {d for n, d in found.items() if "embed" in n or "wte" in n}
    assert below == {len(BLOCKS[kind]) + 1}


def test_a_norm_after_the_last_block_is_part_of_it() -> None:
    model = open_small("vit").bench.model.get_base_model()
    assert depths(model, ["vit.layernorm.weight"]) == (1,)


@given(
    depth=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    decay=st.floats(0.1, 1),
    unfreeze=st.floats(0, 1),
    progress=st.floats(0, 1),
)
def test_what_is_lower_is_slower_and_later(
    depth: list[int], decay: float, unfreeze: float, progress: float
) -> None:
    pace = Pace(depth, [2] * len(depth), decay=decay, unfreeze=unfreeze)
    now, end = pace.at([progress, 1.0])
    assert torch.equal(now[::2], now[1::2]) and now.dtype == torch.float32
    for one, factor, last in zip(depth, now[::2].tolist(), end[::2].tolist(), strict=True):
        assert last == pytest.approx(decay**one, rel=1e-6)  # in the end all of it moves
        assert factor in (0.0, last)
        assert factor == last or one  # the head moves from the start
    order = sorted(zip(depth, now[::2].tolist(), strict=True))
    assert [f for _, f in order] == sorted((f for _, f in order), reverse=True)


def test_without_it_there_is_no_pace() -> None:
    stack = open_small("bert", **PARTIAL)
    assert open_pace(stack, stack.bench.layout, settings()) is None
    assert open_pace(stack, stack.bench.layout, settings(layer_decay=0.5)) is not None


# Training


@pytest.mark.parametrize("kind", ["deep-vit", "bert", "resnet"])
def test_the_first_step_is_shorter_the_lower_it_is(kind: str) -> None:
    """AdamW's first step is the learning rate in every coordinate whose gradient is not tiny."""
    stack = open_small(kind, **PARTIAL)
    layout = stack.bench.layout
    names = [name.removeprefix(OUTER) for name in layout.names]
    depth = depths(stack.bench.model.get_base_model(), names)
    wanted = settings(layer_decay=0.25, batch_size=64)
    moved = np.abs(trained(stack, rows_for(kind, 20), wanted).vector - noisy(stack.bench))
    for name, one in zip(layout.names, depth, strict=True):
        if not felt(layout)[layout.slices[name]].all():
            continue
        assert np.median(moved[layout.slices[name]]) <= 1e-3 * 0.25**one * 1.001
        assert moved[layout.slices[name]].max() == pytest.approx(1e-3 * 0.25**one, rel=2e-2)


def test_what_is_not_open_yet_does_not_move() -> None:
    stack, rows = open_small("deep-vit", **PARTIAL), rows_for("deep-vit", 24)
    layout, wanted = stack.bench.layout, settings(unfreeze=0.8, weight_decay=0.3)
    names = [name.removeprefix(OUTER) for name in layout.names]
    depth = dict(zip(layout.names, depths(stack.bench.model.get_base_model(), names), strict=True))
    assert set(depth.values()) == {0, 1, 2}
    for span, still in ((Span(0, 0.4), {1, 2}), (Span(0.4, 0.6), {2}), (Span(0.8, 1), set())):
        came = trained(stack, rows, wanted, span=span).vector
        for name, one in depth.items():
            same = np.array_equal(
                came[layout.slices[name]], noisy(stack.bench)[layout.slices[name]]
            )
            assert same == (one in still), (span, name)


def test_what_stands_does_not_count_in_the_clipped_norm() -> None:
    """With all of the backbone standing, the head goes as it does where only it trains."""
    stack, rows = open_small("bert", **PARTIAL), rows_for("bert", 24)
    layout = stack.bench.layout
    heads = layout.only(name for name in layout.names if is_head(name))
    clipped = {"clip_norm": 0.05, "epochs": 2}
    start = noisy(stack.bench)
    alone = trained(
        stack, rows, settings(**clipped), layout=heads, span=Span(0, 0.3),
        start=layout.part(start, heads),
    )  # fmt: skip
    whole = stack.bench.initial_of(layout)
    assert not np.array_equal(whole, start)
    # The head alone is trained above initial blocks: start from these to compare.
    start = layout.merged(whole, (heads, layout.part(start, heads)))
    both = trained(stack, rows, settings(unfreeze=1, **clipped), span=Span(0, 0.3), start=start)
    np.testing.assert_allclose(layout.part(both.vector, heads), alone.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "method", [PARTIAL, {**LORA, "targets": "all-linear"}], ids=["partial", "lora"]
)
@pytest.mark.parametrize("kind", ["deep-vit", "bert"])
def test_company_makes_no_difference(kind: str, method: dict[str, Any]) -> None:
    wanted = settings(layer_decay=0.5, unfreeze=0.6, clip_norm=0.05, epochs=2)
    Company(open_small(kind, **method), uneven(kind), wanted).check()


@pytest.mark.parametrize("kind", thinned(KINDS, 2))
@pytest.mark.parametrize(
    "method",
    [PARTIAL, {"kind": "partial", "blocks": 0, "norms": True, "biases": True, "head": "frozen"}],
    ids=["blocks", "norms and biases"],
)
def test_partial_is_trained_by_the_book(kind: str, method: dict[str, Any]) -> None:
    stack, examples, wanted = open_small(kind, **method), rows_for(kind, 20), settings(epochs=2)
    wanted_end, loss = book(stack.bench, examples, wanted)
    result = trained(stack, examples, wanted)
    assert np.abs(result.vector - noisy(stack.bench)).max() > 1e-4
    off = np.abs(result.vector - wanted_end)[felt(stack.bench.layout)]
    assert off.mean() < 1e-6 and off.max() < 1e-4
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.steps == wanted.epochs * math.ceil(20 / wanted.batch_size)
