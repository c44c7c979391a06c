"""Activations of frozen layers that are kept change nothing: not one bit of any result."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.companies import uneven
from support.matrix import thinned
from support.trainings import TOP, felt, noisy, open_small, rows_for, settings, task, texts

from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.cut import Prefix
from fedgraft.client.model.forward import open_feed
from fedgraft.client.model.frozen_prefix import _PassedOver
from fedgraft.client.training.evaluate import measure
from fedgraft.client.training.trainer import Trained, train
from fedgraft.common.config.training import Training
from fedgraft.common.examples import Examples
from fedgraft.common.metrics.measures import LabelMeasures

CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"targets": targets, "dropout": 0.2}) for kind, targets in TOP.items()),
    *(
        (kind, {"kind": "partial", "head": "shared"})
        for kind in ("deep-vit", "bert", "gpt2", "resnet")
    ),
    *((kind, {"kind": "head"}) for kind in ("vit", "resnet", "bert", "roberta", "gpt2", "llama")),
]
each_case = pytest.mark.parametrize(
    ("kind", "method"), thinned(CASES, 2), ids=lambda case: str(case)[:40]
)
UNTOUCHED = {  # a module that is passed over
    "deep-vit": "vit.layers.0",
    "vit": "vit.layers.0",
    "bert": "bert.encoder.layer.0",
    "roberta": "roberta.encoder.layer.0",
    "gpt2": "transformer.h.0",
    "llama": "model.layers.0",
    "resnet": "resnet.encoder.stages.0",
}


def store_in(folder: Path, *, memory: int = 10**9, disk: int = 10**9) -> Store:
    return Store(folder, memory=memory, disk=disk)


def prefix_of(stack: Stack, examples: Examples) -> Prefix | None:
    return open_feed(stack, stack.bench.layout, examples, None).prefix


def federate(
    stack: Stack,
    rows: Sequence[Examples],
    stores: Sequence[Store | None],
    wanted: Training,
) -> list[bytes]:
    """Two rounds of these sites in one pass, all evaluated after each: every bit of it."""
    layout = stack.bench.layout
    vectors = [noisy(stack.bench, seed=site) for site in range(len(rows))]
    found: list[bytes] = []
    for number in (1, 2):
        sites = zip(rows, vectors, stores, strict=True)
        tasks = [
            task(mine, start, seed=10 * number + site, store=store)
            for site, (mine, start, store) in enumerate(sites)
        ]
        results = train(stack, layout, tasks, settings=wanted)
        assert all(isinstance(one, Trained) for one in results)
        for site, one in enumerate(results):
            assert isinstance(one, Trained)
            vectors[site] = one.vector
            found += [one.vector.tobytes(), np.float64(one.loss).tobytes()]
            seen = measure(
                stack, layout, one.vector, rows[site], measures=LabelMeasures(10),
                store=stores[site],
            )  # fmt: skip
            found += [np.float64(seen.tally.loss).tobytes(), seen.tally.confusion.tobytes()]
    return found


# No difference


@pytest.mark.parametrize("precision", thinned(["fp32", "bf16"], 2))
@each_case
def test_what_is_kept_makes_no_difference(
    kind: str, method: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    stack, rows = open_small(kind, precision=precision, **method), uneven(kind, (7, 1, 20))
    assert prefix_of(stack, rows[0]) is not None
    wanted = settings(epochs=2, dropout=0.3, precision=precision)
    plain = federate(stack, rows, [None] * 3, wanted)
    store = store_in(tmp_path)
    kept = federate(stack, rows, [store] * 3, wanted)
    assert kept == plain
    feeds = [open_feed(stack, stack.bench.layout, one, store) for one in rows]
    assert all(feed.kept is not None and feed.kept.dtype == stack.dtype for feed in feeds)
    mixed = federate(stack, rows, [store, None, store], wanted)
    assert mixed == plain


@pytest.mark.parametrize("kind", ["deep-vit", "bert"])
def test_one_site_is_as_it_was_without_a_store(kind: str, tmp_path: Path) -> None:
    stack, rows = open_small(kind, targets=TOP[kind]), [rows_for(kind, 30)]
    wanted = settings(epochs=3, group_by_length=True, accumulation=2)
    plain = federate(stack, rows, [None], wanted)
    assert federate(stack, rows, [store_in(tmp_path)], wanted) == plain


def large(kind: str) -> list[Examples]:
    """So many rows that what is kept of them is worth a file."""
    return [rows_for(kind, 260 if kind == "deep-vit" else 60, seed) for seed in (1, 2)]


@pytest.mark.parametrize("kind", ["deep-vit", "bert"])
def test_what_is_read_from_disk_makes_no_difference(kind: str, tmp_path: Path) -> None:
    stack = open_small(kind, targets=TOP[kind])
    rows, wanted = large(kind), settings(batch_size=60)
    plain = federate(stack, rows, [None] * 2, wanted)
    assert federate(stack, rows, [store_in(tmp_path)] * 2, wanted) == plain
    assert len(list(tmp_path.iterdir())) == 2
    with counted(stack, kind) as calls:
        assert federate(stack, rows, [store_in(tmp_path)] * 2, wanted) == plain
    assert calls == []
    # Mapped from its file where memory has no room for it, and neither where nothing has.
    (tmp_path / "new").mkdir()
    for memory, disk, files in ((0, 10**9, 2), (10**9, 0, 0), (0, 0, 0), (10**6, 10**5, 1)):
        folder = tmp_path / f"{memory} {disk}"
        store = store_in(folder, memory=memory, disk=disk)
        for _ in range(2):
            assert federate(stack, rows, [store] * 2, wanted) == plain
        assert len(list(folder.glob("*"))) == files


def test_what_was_let_go_of_is_computed_again_to_the_same_bits(tmp_path: Path) -> None:
    stack, wanted = open_small("bert", targets=TOP["bert"]), settings()
    rows = [texts(20, seed) for seed in range(6)]
    plain = federate(stack, rows, [None] * 6, wanted)
    feed = open_feed(stack, stack.bench.layout, rows[0], store_in(tmp_path))
    assert feed.kept is not None
    store = store_in(tmp_path, memory=10 * feed.kept.nbytes)  # it fits, but not all of them do
    assert store.fits(feed.kept.nbytes)
    assert federate(stack, rows, [store] * 6, wanted) == plain
    held = [open_feed(stack, stack.bench.layout, one, None) for one in rows]
    assert all(one.kept is None for one in held)


@each_case
def test_results_are_those_of_the_whole_model(kind: str, method: dict[str, Any]) -> None:
    stack, rows = open_small(kind, **method), uneven(kind, (9, 14))
    wanted = settings(epochs=2, dropout=0.3)
    layout = stack.bench.layout
    ends = []
    for whole in (False, True):
        stack.prefixes.clear()
        if whole:
            stack.prefixes[layout.names] = None
        tasks = [task(one, noisy(stack.bench), seed=n) for n, one in enumerate(rows)]
        ends.append([one for one in train(stack, layout, tasks, settings=wanted)])
    stack.prefixes.clear()
    for one, other in zip(*ends, strict=True):
        assert isinstance(one, Trained) and isinstance(other, Trained)
        off = np.abs(one.vector - other.vector)[felt(layout)]
        assert off.max() < 5e-4 and off.mean() < 1e-6
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


# What is passed over


@contextmanager
def counted(stack: Stack, kind: str) -> Iterator[list[int]]:
    """The forward passes of a frozen layer, as a list of their rows."""
    calls: list[int] = []

    def count(module: object, args: Any, output: Any) -> None:
        calls.append(len(output[0] if isinstance(output, tuple) else output))

    handle = stack.model.get_submodule(UNTOUCHED[kind]).register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@each_case
def test_frozen_layers_compute_each_example_once(
    kind: str, method: dict[str, Any], tmp_path: Path
) -> None:
    stack, rows = open_small(kind, **method), uneven(kind, (12, 20))
    prefix_of(stack, rows[0])
    store, wanted = store_in(tmp_path), settings(epochs=3)
    with counted(stack, kind) as calls:
        federate(stack, rows, [store] * 2, wanted)
    assert 32 <= sum(calls) <= 32 + 8 * 6  # of small groups some rows are computed twice
    with counted(stack, kind) as calls:
        federate(stack, rows, [store] * 2, wanted)
    assert calls == []
    with counted(stack, kind) as calls:
        federate(stack, rows, [None] * 2, wanted)
    assert sum(calls) >= 32 * 4 * 2  # three epochs and an evaluation, twice


@each_case
def test_nothing_stays_in_the_place_of_a_layer(kind: str, method: dict[str, Any]) -> None:
    stack = open_small(kind, **method)
    before = {path: id(module) for path, module in stack.model.named_modules()}
    federate(stack, uneven(kind, (7, 3)), [None] * 2, settings())
    assert {path: id(module) for path, module in stack.model.named_modules()} == before
    hooks = [m for m in stack.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_a_layer_is_back_after_a_failure() -> None:
    stack = open_small("bert", targets=TOP["bert"])
    assert prefix_of(stack, texts(9)) is not None

    def fail(module: object, args: object, output: object) -> None:
        raise ZeroDivisionError

    handle = stack.model.get_submodule("classifier").register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        train(stack, stack.bench.layout, [task(texts(9), noisy(stack.bench))], settings=settings())
    handle.remove()
    assert not any(isinstance(module, _PassedOver) for module in stack.model.modules())


# Where the cut is


@pytest.mark.parametrize(
    ("kind", "method", "whole", "by_token"),
    [
        ("bert", {"kind": "head"}, False, False),  # dropout and a layer, behind the pooler
        ("roberta", {"kind": "head"}, False, True),
        ("vit", {"kind": "head"}, False, False),
        ("resnet", {"kind": "head"}, False, False),
        ("gpt2", {"kind": "head"}, True, True),  # its head picks tokens: only all layers are cut
        ("llama", {"kind": "head"}, True, True),
        *((kind, {"targets": TOP[kind]}, True, kind not in ("deep-vit", "resnet")) for kind in TOP),
        ("bert", {"targets": ["pooler.dense"]}, True, True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_cut_is_where_the_first_trained_layer_is(
    kind: str, method: dict[str, Any], whole: bool, by_token: bool
) -> None:
    prefix = prefix_of(open_small(kind, **method), rows_for(kind, 10))
    assert prefix is not None
    assert (prefix.whole, prefix.by_token) == (whole, by_token)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", ["layer.0.output.dense"]),
        ("bert", "all-linear"),
        ("deep-vit", ["layers.0.mlp.fc1", "layers.3.mlp.fc1"]),
        ("deep-vit", ["projection", "layers.3.mlp.fc1"]),  # of the patches, before all layers
        ("gpt2", ["h.0.mlp.c_fc"]),
        ("resnet", "all-conv"),
    ],
    ids=str,
)
def test_there_is_none_where_the_first_layer_trains(
    kind: str, targets: Any, tmp_path: Path
) -> None:
    stack, rows = open_small(kind, targets=targets), rows_for(kind, 20)
    assert prefix_of(stack, rows) is None
    assert federate(stack, [rows], [store_in(tmp_path)], settings()) == (
        federate(stack, [rows], [None], settings())
    )
    assert list(tmp_path.iterdir()) == []


def test_fewer_tensors_have_a_cut_of_their_own() -> None:
    stack, rows = open_small("bert"), texts(10)
    layout = stack.bench.layout
    heads = layout.only(name for name in layout.names if "classifier" in name)
    assert open_feed(stack, layout, rows, None).prefix is None
    found = open_feed(stack, heads, rows, None).prefix
    assert found is not None and not found.whole
