"""An adapter as one vector: ordered, written and read exactly."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from peft import PeftModel
from support.matrix import tries
from support.tiny_backbones import Bench, some_vector, trainable

from fedgraft.common.adapters.attach import adapter_layout, read, write
from fedgraft.common.errors import AdapterError
from fedgraft.common.layout import Layout, Vector, is_factor_a, is_head

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


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
@settings(max_examples=tries(40), deadline=None)
def test_what_was_written_is_read_bit_for_bit(bert: PeftModel, data: st.DataObject) -> None:
    layout = adapter_layout(bert)
    vector: Vector = data.draw(
        hnp.arrays(np.float32, layout.size, elements=st.floats(width=32, allow_nan=False))
    )
    write(bert, layout, vector)
    assert read(bert, layout).tobytes() == vector.tobytes()


@given(data=st.data())
@settings(max_examples=tries(40), deadline=None)
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
