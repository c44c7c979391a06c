"""Rules add up what they say, and server optimisers do what their papers' equations say."""

import math
import tracemalloc
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgraft.common.aggregation import RULES, RunningMean
from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.aggregation.median import PIECE
from fedgraft.common.config.sections import Aggregation, ServerOptimizer
from fedgraft.common.layout import Layout
from fedgraft.server.optimizers import apply
from fedgraft.server.state import Moments

INDIVIDUAL = {name for name, rule in RULES.items() if rule.needs == "individual"}
MEANS = [name for name, rule in RULES.items() if isinstance(rule, MeanRule)]
LAYOUT = Layout(
    (
        "base.q.lora_A.default.weight",
        "base.v.lora_A.default.weight",
        "base.q.lora_B.default.weight",
        "base.v.lora_B.default.weight",
        "base.classifier.modules_to_save.default.weight",
    ),
    ((2, 6), (2, 6), (5, 2), (5, 2), (3, 5)),
)

# The running mean


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_the_running_mean_is_the_weighted_average_in_any_order(
    count: int, seed: int, shuffle: Any
) -> None:
    draw = np.random.default_rng(seed)
    updates = draw.normal(size=(count, 5)).astype(np.float32)
    weights = draw.uniform(0.5, 1e6, count)
    order = list(range(count))
    shuffle.shuffle(order)
    mean = RunningMean(5)
    for index in order:
        mean.add(updates[index], float(weights[index]))
    wanted = np.average(updates.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(mean.combined(), wanted, rtol=0, atol=1e-13)
    assert mean.count == count
    assert mean.weight == pytest.approx(weights.sum())


def test_the_sum_is_kept_in_float64() -> None:
    mean = RunningMean(1)
    mean.add(np.array([2**24], np.float32), 1.0)
    mean.add(np.array([1], np.float32), 1.0)
    assert mean.combined().dtype == np.float64
    assert mean.combined()[0] * 2 == 2**24 + 1  # float32 would round the one away


def test_a_product_with_the_weight_does_not_overflow_float32() -> None:
    mean = RunningMean(1)
    mean.add(np.array([3e38], np.float32), 1e6)
    assert mean.combined()[0] == pytest.approx(float(np.float32(3e38)))


def test_adding_does_not_change_the_update() -> None:
    update = np.arange(3, dtype=np.float32)
    RunningMean(3).add(update, 7.0)
    assert update.tolist() == [0, 1, 2]


def test_the_mean_holds_one_vector_whatever_was_added() -> None:
    size = 100_000
    mean = RunningMean(size)
    mean.add(np.ones(size, np.float32), 1.0)
    tracemalloc.start()
    for _ in range(20):
        mean.add(np.ones(size, np.float32), 2.0)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10_000
    assert peak < 3 * 8 * size  # the update that is being added and its product


def test_the_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        RunningMean(3).combined()


# The rules


def test_the_registry_holds_the_rules_that_a_job_may_name() -> None:
    assert set(RULES) == set(get_args(Aggregation.model_fields["rule"].annotation))


def test_fedavg_exchanges_every_tensor() -> None:
    assert RULES["fedavg"].exchanges(LAYOUT) == LAYOUT.names


def test_ffa_keeps_the_factors_a_at_home() -> None:
    assert RULES["ffa"].exchanges(LAYOUT) == LAYOUT.names[2:]


def test_fedsa_keeps_the_factors_b_at_home() -> None:
    kept = RULES["fedsa"].exchanges(LAYOUT)
    assert set(LAYOUT.names) - set(kept) == {name for name in LAYOUT.names if ".lora_B." in name}


def test_a_job_knows_which_rules_must_see_each_update() -> None:
    assert {rule.needs for rule in RULES.values()} == {"sum", "individual"}
    assert "median" in INDIVIDUAL and not INDIVIDUAL & {"fedavg", "ffa", "fedsa"}
    refusing = {name for name, rule in RULES.items() if "secure_aggregation" in rule.refuses}
    assert refusing == INDIVIDUAL


@pytest.mark.parametrize("name", [*MEANS, "median"])
def test_a_rule_steps_by_what_was_combined(name: str) -> None:
    combined = np.linspace(-1, 1, 9)
    assert RULES[name].merge(combined).tolist() == np.linspace(-1, 1, 9).tolist()


@pytest.mark.parametrize("name", sorted(set(RULES) - INDIVIDUAL))
def test_what_a_rule_that_needs_only_sums_collects_is_the_weighted_mean(name: str) -> None:
    """Then it does not matter that under masks somebody else computes it."""
    collector = RULES[name].collect(2)
    collector.add(np.array([1, -3], np.float32), 1.0)
    collector.add(np.array([5, 5], np.float32), 3.0)
    assert collector.combined().tolist() == [4.0, 3.0]
    assert collector.count == 2


@pytest.mark.parametrize("name", sorted(RULES))
def test_no_updates_cannot_be_combined(name: str) -> None:
    collector = RULES[name].collect(3)
    assert collector.count == 0
    with pytest.raises(ZeroDivisionError):
        collector.combined()


# The median


def _median(updates: NDArray[np.float32], weights: list[float]) -> NDArray[np.float64]:
    collector = RULES["median"].collect(updates.shape[1])
    for update, weight in zip(updates, weights, strict=True):
        collector.add(update, weight)
    assert collector.count == len(updates)
    return collector.combined()


def test_the_median_exchanges_every_tensor() -> None:
    assert RULES["median"].exchanges(LAYOUT) == LAYOUT.names


@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_the_median_is_numpys_coordinate_by_coordinate(count: int, size: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    updates = draw.normal(size=(count, size)).astype(np.float32)
    combined = _median(updates, [1.0] * count)
    assert combined.dtype == np.float64
    assert combined.tolist() == np.median(updates, axis=0).tolist()


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3])
def test_the_median_does_not_depend_on_where_pieces_end(size: int) -> None:
    updates = np.random.default_rng(size).normal(size=(4, size)).astype(np.float32)
    assert np.array_equal(_median(updates, [1.0] * 4), np.median(updates, axis=0))


def test_the_median_of_an_even_number_lies_between_the_two_in_the_middle() -> None:
    updates = np.array([[1.0], [2.0], [4.0], [100.0]], np.float32)
    assert _median(updates, [1.0] * 4).tolist() == [3.0]


def test_sites_count_alike_in_the_median_whatever_their_weight() -> None:
    updates = np.array([[1.0], [2.0], [3.0]], np.float32)
    assert _median(updates, [1e6, 1.0, 0.5]).tolist() == [2.0]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e30, -1e30, 3e38]))
def test_one_wild_site_cannot_move_the_median_beyond_the_others(seed: int, wild: float) -> None:
    draw = np.random.default_rng(seed)
    honest = draw.normal(size=(4, 6)).astype(np.float32)
    signs = draw.choice([-1.0, 1.0], size=(1, 6))
    updates = np.concatenate([honest, (wild * signs).astype(np.float32)])
    combined = _median(updates, [1.0] * 5)
    assert (combined >= honest.min(axis=0)).all()
    assert (combined <= honest.max(axis=0)).all()
    mean = RunningMean(6)
    for update in updates:
        mean.add(update, 1.0)
    assert (np.abs(mean.combined()) > 1e20).all()  # the mean goes where the wild one wants


def test_combining_changes_none_of_the_updates() -> None:
    updates = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0]], np.float32)
    before = updates.tolist()
    _median(updates, [1.0] * 3)
    assert updates.tolist() == before


def test_the_median_holds_the_updates_and_copies_them_only_piece_by_piece() -> None:
    size = 8 * PIECE
    collector = RULES["median"].collect(size)
    for _ in range(8):
        collector.add(np.ones(size, np.float32), 1.0)
    tracemalloc.start()
    collector.combined()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * size + 8 * 4 * size / 2  # the result, and less than half of a copy of all


# Where the rules meet


def _product_gap(rule: str) -> float:
    """|BA of the averaged adapter - average of the sites' BA|, relative, for one module."""
    layout = Layout(
        ("base.q.lora_A.default.weight", "base.q.lora_B.default.weight"), ((2, 6), (5, 2))
    )
    exchanged = layout.only(RULES[rule].exchanges(layout))
    draw = np.random.default_rng(3)
    start = draw.normal(size=layout.size)
    sites = [(start.copy(), weight) for weight in (1.0, 4.0, 2.5)]
    mean = RunningMean(exchanged.size)
    for vector, weight in sites:
        for name in exchanged.names:
            vector[layout.slices[name]] += draw.normal(size=5 * 2 if "lora_B" in name else 2 * 6)
        moved = (vector - start).astype(np.float32)
        vector[:] = start + moved
        sent = np.concatenate([moved[layout.slices[name]] for name in exchanged.names])
        mean.add(sent, weight)
    merged = start.copy()
    step = RULES[rule].merge(mean.combined())
    for name in exchanged.names:
        merged[layout.slices[name]] += step[exchanged.slices[name]]

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = (vector[layout.slices[name]] for name in layout.names)
        return b.reshape(5, 2) @ a.reshape(2, 6)

    wanted = sum(weight * product(vector) for vector, weight in sites) / mean.weight
    return float(np.linalg.norm(product(merged) - wanted) / np.linalg.norm(wanted))


def test_ffa_averages_the_products_exactly_and_fedavg_does_not() -> None:
    assert _product_gap("ffa") < 1e-12
    assert _product_gap("fedavg") > 0.1


# The server's optimisers

Kind = Literal["none", "momentum", "adam", "yogi", "reptile"]
KINDS = get_args(ServerOptimizer.model_fields["kind"].annotation)


def _slow(settings: ServerOptimizer, x: list[float], steps: list[list[float]]) -> list[float]:
    """Reddi et al. 2021 (algorithm 2), FedAvgM (Hsu et al. 2019) and Reptile, by single numbers."""
    x = list(x)
    for i in range(len(x)):
        m, v = 0.0, settings.tau**2
        for number, step in enumerate(steps):
            delta = step[i]
            if settings.kind == "none":
                move = delta
            elif settings.kind == "reptile":
                move = delta * (len(steps) - number) / len(steps)
            elif settings.kind == "momentum":
                m = settings.beta1 * m + delta
                move = m
            else:
                m = settings.beta1 * m + (1 - settings.beta1) * delta
                if settings.kind == "adam":
                    v = settings.beta2 * v + (1 - settings.beta2) * delta * delta
                else:
                    sign = (v > delta * delta) - (v < delta * delta)
                    v = v - (1 - settings.beta2) * delta * delta * sign
                move = m / (math.sqrt(v) + settings.tau)
            x[i] = float(np.float32(x[i] + settings.learning_rate * move))
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_follows_its_papers_equations(kind: Kind) -> None:
    settings = ServerOptimizer(kind=kind, learning_rate=0.3, beta1=0.8, beta2=0.95, tau=0.01)
    draw = np.random.default_rng(11)
    start = draw.normal(size=6).astype(np.float32)
    # Steps that shrink and grow: yogi's v then moves both ways.
    steps = [draw.normal(size=6) * scale for scale in (1.0, 0.05, 2.0, 0.01, 0.5, 3.0)]
    x, moments = start, Moments()
    for number, step in enumerate(steps):
        x, moments = apply(settings, x, step, moments, done=number / len(steps))
    wanted = _slow(settings, start.tolist(), [step.tolist() for step in steps])
    np.testing.assert_allclose(x, wanted, rtol=2e-6)


def test_the_kinds_differ_after_two_steps() -> None:
    ends = set()
    for kind in KINDS:
        x, moments = np.zeros(1, np.float32), Moments()
        for done, step in ((0.0, np.array([1.0])), (0.5, np.array([0.02]))):
            x, moments = apply(ServerOptimizer(kind=kind), x, step, moments, done=done)
        ends.add(float(x[0]))
    assert len(ends) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_changes_nothing_in_place(kind: Kind) -> None:
    settings = ServerOptimizer(kind=kind)
    x, step = np.ones(4, np.float32), np.full(4, 0.5)
    x_after, moments = apply(settings, x, step, {})
    kept = {name: value.copy() for name, value in moments.items()}
    first = x_after.copy()
    x_last, _ = apply(settings, x_after, step, moments)
    assert x.tolist() == [1] * 4 and step.tolist() == [0.5] * 4
    assert x_after.tolist() == first.tolist()
    assert all(np.array_equal(moments[name], kept[name]) for name in kept)
    assert x_after.dtype == x_last.dtype == np.float32
    assert all(value.dtype == np.float64 for value in moments.values())


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_no_first_step_is_unbounded(kind: Kind) -> None:
    settings = ServerOptimizer(kind=kind, tau=1e-3)
    moved, _ = apply(settings, np.zeros(3, np.float32), np.array([1e-12, 0.0, 1e3]), {})
    assert abs(moved[0]) < 1e-9  # without tau it would be as large as any other step
    assert moved[1] == 0
    assert abs(moved[2]) < 10.0


def test_a_plain_step_is_scaled_by_the_servers_rate() -> None:
    settings = ServerOptimizer(kind="none", learning_rate=0.5)
    moved, moments = apply(settings, np.array([1.0], np.float32), np.array([2.0]), {})
    assert moved.tolist() == [2.0]
    assert moments == {}
