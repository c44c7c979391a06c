"""Statistics of sites with and without labels: what they are, what they pull, who sends what."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.companies import Company, uneven
from support.matrix import thinned
from support.trainings import KINDS, make_job, rows_for, settings, task
from torch.nn import functional

from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.model.forward import open_feed, predict
from fedgraft.client.training.domain_adaptation import Alignment, direction, growth, watch_features
from fedgraft.client.training.trainer import Span, Trained, train
from fedgraft.common.adapters.domain_statistics import domain_tensors, feature_size, frequencies
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.training import DomainAdaptation
from fedgraft.common.examples import IGNORED, Examples, has_labels
from fedgraft.common.layout import DOMAIN, Layout, Vector

ADAPTING = ("coral", "mmd", "dann")
LATE = Span(0.5, 0.6)  # when the weight has grown


def adapting(name: str, how: str) -> Stack:
    domain = {"kind": how, "components": 32, "hidden": 8}
    return open_stack(make_job(name, training={"domain": domain}))


def unlabelled(rows: Any) -> Any:
    return replace(rows, labels=np.full(len(rows), IGNORED))


def ended(
    stack: Stack, rows: Examples, start: Vector, how: str, span: Span = LATE, **more: Any
) -> Vector:
    domain = {"kind": how, "components": 32, "weight": more.pop("weight", 1.0)}
    wanted = settings(domain=domain, **more)
    (came,) = train(stack, stack.bench.layout, [task(rows, start)], settings=wanted, span=span)
    assert isinstance(came, Trained)
    return came.vector


def slot(stack: Stack, vector: Vector, name: str) -> Vector:
    return vector[stack.bench.layout.slices[f"{DOMAIN}{name}"]]


@torch.inference_mode()
def features_of(stack: Stack, vector: Vector, rows: Examples) -> torch.Tensor:
    stack.put_one(stack.bench.layout, vector)
    index = np.arange(len(rows))
    feed = open_feed(stack, stack.bench.layout, rows, None)
    with watch_features(stack) as seen:
        predict([feed], [index], rows.width(index))
    return direction(seen[0], torch.from_numpy(rows.lengths), rows.pad_left)


# What travels


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_as_many_as_enter_the_head(kind: str) -> None:
    stack = adapting(kind, "coral")
    found = features_of(stack, stack.bench.initial, rows_for(kind, 5))
    size = feature_size(stack.bench.model.get_base_model())
    assert found.shape == (5, size)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    shapes = dict(zip(stack.bench.layout.names, stack.bench.layout.shapes, strict=True))
    assert shapes[f"{DOMAIN}source.second"] == (size, size)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_in_the_mean(left: bool) -> None:
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    real = hidden[0, 2:] if left else hidden[0, :2]
    wanted = functional.normalize(torch.stack([real.mean(0), hidden[1].mean(0)]), dim=-1)
    torch.testing.assert_close(direction(hidden, torch.tensor([2, 4]), left), wanted)


@pytest.mark.parametrize("how", ["coral", "mmd"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_site_tells_its_own_groups_means_and_nothing_of_the_other(
    how: str, labelled: bool
) -> None:
    stack, rows = adapting("bert", how), rows_for("bert", 20)
    rows = rows if labelled else unlabelled(rows)
    came = ended(stack, rows, stack.bench.initial, how, learning_rate=1e-9)
    own, other = ("source", "target") if labelled else ("target", "source")
    features = features_of(stack, came, rows)
    assert slot(stack, came, f"{own}.seen") == np.float32(SCALE)
    if how == "coral":
        expected = {"mean": features.mean(0), "second": features.T @ features / 20}
    else:
        weights, phases = frequencies(features.shape[1], 32, 0)
        waves = (features @ weights + phases).cos() * math.sqrt(2 / 32)
        expected = {"embedding": waves.mean(0)}
    for name, value in expected.items():
        found = slot(stack, came, f"{own}.{name}") / SCALE
        np.testing.assert_allclose(found, value.flatten().numpy(), atol=1e-5)
        assert not slot(stack, came, f"{other}.{name}").any()
    assert not slot(stack, came, f"{other}.seen")


@given(size=st.integers(1, 40), seed=st.integers(0, 5), how=st.sampled_from(["coral", "mmd"]))
def test_nothing_is_larger_than_what_is_clipped_at(size: int, seed: int, how: str) -> None:
    """|mean of unit vectors| <= 1, so are second moments; waves are at most sqrt(2 / m)."""
    layout, start = domain_tensors(DomainAdaptation(kind=how), size, seed)
    assert not start.any() and layout.size == len(start)
    features = functional.normalize(
        torch.randn(3, size, generator=torch.Generator().manual_seed(seed)), dim=-1
    )
    aligned = alignment(how, layout, [rows_for("bert", 3)], start[None])
    aligned.take([aligned._statistics(features)], [3])
    vector = start.copy()
    aligned.write(0, vector)
    assert np.abs(vector).max() <= SCALE * (1 + 1e-6)


def alignment(how: str, layout: Layout, rows: Any, flat: Any, **more: Any) -> Alignment:
    wanted = DomainAdaptation.model_validate({"kind": how, **more})
    return Alignment(wanted, layout, rows, torch.from_numpy(np.ascontiguousarray(flat)), 0)


def test_random_waves_give_the_kernel() -> None:
    """Rahimi and Recht: the mean over components of z(x) z(y) is the mean of the kernels."""
    weights, phases = frequencies(8, 200_000, 3)
    x, y = functional.normalize(
        torch.randn(2, 8, generator=torch.Generator().manual_seed(1)), dim=1
    )
    waves = [(one @ weights + phases).cos() * math.sqrt(2 / 200_000) for one in (x, y)]
    far = float(((x - y) ** 2).sum())
    wanted = np.mean([math.exp(-far / (2 * squared)) for squared in (0.25, 0.5, 1, 2, 4)])
    assert float(waves[0] @ waves[1]) == pytest.approx(wanted, abs=0.01)


# What it pulls


def test_the_weight_grows_from_nothing() -> None:
    assert growth(0) == 0 and growth(1) > 0.999
    assert growth(0.1) < growth(0.2) < growth(0.9)


@pytest.mark.parametrize("how", ["coral", "mmd"])
def test_before_the_other_group_has_said_anything_nothing_is_aligned(how: str) -> None:
    stack, rows = adapting("bert", how), rows_for("bert", 20)
    plain, adapted = (
        ended(stack, rows, stack.bench.initial, how, weight=weight, epochs=2)
        for weight in (1e-9, 100.0)
    )
    np.testing.assert_array_equal(plain, adapted)


def shifted(rows: Any) -> Any:
    """Texts of a few words only, or negatives of images."""
    if hasattr(rows, "ids"):
        return replace(rows, ids=(2 + rows.ids % 3).astype(np.int32))
    return replace(rows, values=-rows.values)


@pytest.mark.parametrize("how", ["coral", "mmd"])
@pytest.mark.parametrize("kind", ["deep-vit", "bert", "resnet"])
def test_a_site_without_labels_comes_closer_to_those_that_have_some(kind: str, how: str) -> None:
    stack = adapting(kind, how)
    theirs, mine = rows_for(kind, 40, 1), unlabelled(shifted(rows_for(kind, 40, 5)))
    told = ended(stack, theirs, stack.bench.initial, how, learning_rate=1e-9)
    start = stack.bench.initial.copy()
    for name, where in stack.bench.layout.slices.items():
        if name.startswith(DOMAIN):
            start[where] = told[where] / 4  # one of four sites has labels

    def distance(vector: Vector) -> float:
        one, other = (features_of(stack, v, r) for v, r in ((start, theirs), (vector, mine)))
        if how == "coral":
            return float((torch.cov(one.T) - torch.cov(other.T)).square().sum())
        weights, phases = frequencies(one.shape[1], 32, 0)
        embedded = [((f @ weights + phases).cos()).mean(0) for f in (one, other)]
        return float((embedded[0] - embedded[1]).square().sum())

    after = ended(stack, mine, start, how, weight=100.0, epochs=6)
    assert distance(after) < 0.8 * distance(start)


def test_a_discriminator_learns_and_features_mislead_it() -> None:
    stack = adapting("bert", "dann")
    start, rows = stack.bench.initial, rows_for("bert", 16)
    assert slot(stack, start, "first.weight").any()
    for labelled in (True, False):
        mine = rows if labelled else unlabelled(rows)
        came = ended(stack, mine, start, "dann", weight=1e-9, epochs=4, learning_rate=1e-2)
        said = [told(stack, one, features_of(stack, start, rows)).mean() for one in (start, came)]
        assert (said[1] > said[0]) == labelled  # what a site has is what it learns to say
        misled = ended(stack, mine, start, "dann", weight=10.0, epochs=4, learning_rate=1e-2)
        before, after = (
            told(stack, start, features_of(stack, v, rows)).mean() for v in (came, misled)
        )
        assert (after < before) == labelled  # and its features are made to say the opposite


def told(stack: Stack, vector: Vector, features: torch.Tensor) -> torch.Tensor:
    shapes = dict(zip(stack.bench.layout.names, stack.bench.layout.shapes, strict=True))
    first, first_bias, second, second_bias = (
        torch.from_numpy(slot(stack, vector, name)).view(shapes[f"{DOMAIN}{name}"])
        for name in ("first.weight", "first.bias", "second.weight", "second.bias")
    )
    scaled = features * math.sqrt(features.shape[1])
    return functional.linear(functional.relu(scaled @ first.T + first_bias), second, second_bias)


# In company


@pytest.mark.parametrize("how", ADAPTING)
@pytest.mark.parametrize("kind", thinned(["bert", "deep-vit", "resnet", "roberta"], 2))
def test_company_makes_no_difference(kind: str, how: str) -> None:
    stack = adapting(kind, how)
    rows = [unlabelled(one) if n % 2 else one for n, one in enumerate(uneven(kind))]
    assert [has_labels(one) for one in rows] == [True, False, True, False]
    layout = stack.bench.layout
    company = Company(
        stack, rows, settings(domain={"kind": how, "components": 32, "hidden": 8}, epochs=2)
    )
    for start in company.starts:  # as if both groups had said something
        for name, where in layout.slices.items():
            if name.startswith(DOMAIN) and how != "dann":
                start[where] = 0.03 if name.endswith("seen") else start[where] / 50
    company.check()


@pytest.mark.parametrize("how", ADAPTING)
def test_micro_batches_make_no_difference_to_what_is_told(how: str) -> None:
    stack, rows = adapting("bert", how), rows_for("bert", 24)
    start = stack.bench.initial
    one, other = (
        ended(stack, rows, start, how, learning_rate=1e-9, accumulation=parts) for parts in (1, 4)
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
