"""Quantisation: unbiased, bounded, exact at the edge of the ring, refused one past it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg import reference as slow
from support.matrix import tries

from fedgraft.common.secagg import quantize as q
from fedgraft.common.secagg.errors import InputRefused, ParameterError
from fedgraft.common.secagg.quantize import Coding

RINGS = {16: 8, 24: 17, 32: 20}


class Ones(np.random.Generator):
    """The largest number below one, always."""

    def random(self, size: int) -> np.ndarray:  # type: ignore[override]
        return np.full(size, np.nextafter(1.0, 0.0))


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-2, 2, width=32), max_size=20),
    weight=st.integers(1, 1000),
    seed=st.integers(0, 2**32),
)
def test_elements_are_those_of_the_formula(values: list[float], weight: int, seed: int) -> None:
    coding = Coding(10, 0.7, max_weight=1000)
    update = np.array(values, np.float32)
    vector = q.encode_update(update, weight, (0.5, -3.0), coding, np.random.default_rng(seed))
    uniform = np.random.default_rng(seed).random(len(values)).tolist()
    case = {"value_bits": 17, "clip": 0.7, "max_weight": 1000}
    got = vector[q.LANES :].view(np.int32)
    wanted = slow.quantise(update.tolist(), weight, case, uniform)
    assert np.abs(got - np.array(wanted, np.int64)).max(initial=0) <= 1  # one ulp may cross a floor
    assert np.abs(got).max(initial=0) <= coding.levels
    assert vector[: q.LANES].tolist() == slow.header(
        weight, (0.5, -3.0), {"parties": 10, "metric_limit": 1024.0}
    )


def test_a_count_without_room_is_refused_and_one_at_the_edge_is_not() -> None:
    """Counts are whole levels and are not drawn; clipped ones would be wrong in silence."""
    levels = Coding(10, 1.0).levels
    coding = Coding(10, float(levels), max_weight=1)
    edge = np.array([levels, -levels, 0], np.float64)
    vector = q.encode_update(edge, 1, (), coding, None)
    assert vector[q.LANES :].view(np.int32).tolist() == edge.tolist()
    for beyond in (levels + 1, -levels - 1):
        with pytest.raises(InputRefused, match="a count is larger"):
            q.encode_update(np.array([beyond], np.float64), 1, (), coding, None)
    drawn = q.encode_update(edge * 2, 1, (), coding, np.random.default_rng(0))  # an update is cut
    assert np.abs(drawn[q.LANES :].view(np.int32)).max() == levels


def test_rounding_is_unbiased_and_off_by_less_than_one_level() -> None:
    coding = Coding(3, 1.0, max_weight=7)
    update = np.full(200_000, 0.123456)
    vector = q.encode_update(update, 3, (), coding, np.random.default_rng(1))
    exact = 0.123456 * 3 / 7 * coding.levels
    levels = vector[q.LANES :].view(np.int32)
    assert set(levels.tolist()) == {math.floor(exact), math.ceil(exact)}
    assert abs(levels.mean() - exact) < 5 * 0.5 / math.sqrt(update.size)


@settings(deadline=None, max_examples=tries(30))
@given(
    n=st.integers(1, 6),
    size=st.integers(0, 30),
    seed=st.integers(0, 2**32),
    ring=st.sampled_from(sorted(RINGS)),
)
def test_the_mean_is_within_the_stated_bound(n: int, size: int, seed: int, ring: int) -> None:
    generator = np.random.default_rng(seed)
    coding = Coding(n, 0.9, ring_bits=ring, value_bits=RINGS[ring], max_weight=500)
    total = np.zeros(q.LANES + size, np.uint32)
    exact, weights = np.zeros(size), 0
    for _ in range(n):
        update = generator.normal(0, 0.6, size).astype(np.float32)
        weight = int(generator.integers(1, 501))
        vector = q.encode_update(update, weight, (2.0,), coding, generator)
        q.add_packed(total, q.pack(vector, ring), ring)
        exact += weight * np.clip(update.astype(np.float64), -0.9, 0.9)
        weights += weight
    lanes = q.read_lanes(total, coding)
    assert (lanes.count, lanes.weight, lanes.intact) == (n, weights, True)
    assert lanes.metrics == pytest.approx((2.0 * n, 0.0), abs=1e-5 * n)
    mean = q.mean(q.signed(total[q.LANES :], ring), weights, coding)
    bound = q.error_bound(n, weights, coding)
    assert np.abs(mean - exact / weights).max(initial=0) < bound * (1 + 1e-9)


@pytest.mark.parametrize(("ring", "bits", "most"), [(16, 8, 258), (24, 17, 128), (32, 20, 4096)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_edge_of_the_ring_is_exact_and_one_past_it_refused(
    ring: int, bits: int, most: int, sign: float
) -> None:
    coding = Coding(most, 0.1, ring_bits=ring, value_bits=bits)
    total = np.zeros(q.LANES + 5, np.uint32)
    update = np.full(5, sign)
    generator = Ones(np.random.PCG64(0))
    vector = q.encode_update(update, coding.max_weight, (), coding, generator)
    packed = q.pack(vector, ring)
    for _ in range(most):
        q.add_packed(total, packed, ring)
    edge = most * coding.levels
    sums = q.signed(total[q.LANES :], ring).tolist()
    assert sums == [edge] * 5 if sign > 0 else all(-edge <= s <= -edge + most for s in sums)
    assert edge <= 2 ** (ring - 1) - 1 < (most + 1) * coding.levels
    with pytest.raises(ParameterError):
        Coding(most + 1, 0.1, ring_bits=ring, value_bits=bits)


@pytest.mark.parametrize("clip", [0.1, 0.3, 1e-3, 5.0])
def test_a_clip_that_is_no_float32_does_not_overflow(clip: float) -> None:
    coding = Coding(128, clip)
    update = np.full(1000, np.float32(clip))
    vector = q.encode_update(update, coding.max_weight, (), coding, Ones(np.random.PCG64(0)))
    assert int(vector[q.LANES :].view(np.int32).max()) == coding.levels


@given(
    values=st.lists(st.integers(0, 2**32 - 1), max_size=23),
    ring=st.sampled_from(sorted(RINGS)),
)
def test_packing_keeps_the_low_bits(values: list[int], ring: int) -> None:
    vector = np.array([*range(8), *values], np.uint32)
    packed = q.pack(vector, ring)
    assert packed.tobytes() == slow.pack(vector.tolist(), ring)
    assert packed.size == q.packed_size(len(values), ring)
    total = vector.copy()
    q.add_packed(total, packed, ring)
    wanted = [2 * value % 2**ring for value in values]
    signed = [value - 2**ring if value >> ring - 1 else value for value in wanted]
    assert q.signed(total[8:], ring).tolist() == signed
    assert total[:8].tolist() == [2 * lane for lane in range(8)]


def test_packing_works_on_more_than_one_piece() -> None:
    size = 2 * q.PIECE + 5
    vector = np.arange(size + q.LANES, dtype=np.uint32) * np.uint32(2654435761)
    for ring in RINGS:
        total = np.zeros_like(vector)
        q.add_packed(total, q.pack(vector, ring), ring)
        np.testing.assert_array_equal(
            total[8:] & np.uint32(2**ring - 1), vector[8:] & np.uint32(2**ring - 1)
        )


@pytest.mark.parametrize(
    "packed",
    [np.zeros(10, np.uint8), np.zeros(44, np.int8), np.zeros((1, 44), np.uint8)],
)
def test_an_upload_of_another_size_or_type_is_refused(packed: np.ndarray) -> None:
    total = np.zeros(12, np.uint32)
    with pytest.raises(ParameterError):
        q.add_packed(total, packed, 24)
    with pytest.raises(ParameterError):
        q.add_packed(total, np.zeros(88, np.uint8)[::2], 24)
    assert not total.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(bad: float) -> None:
    update = np.zeros(q.PIECE + 3)
    update[-1] = bad
    with pytest.raises(InputRefused):
        q.encode_update(update, 1, (), Coding(3, 1.0), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("update", "weight", "metrics"),
    [
        (np.zeros(2), 0, ()),
        (np.zeros(2), -1, ()),
        (np.zeros(2), 65537, ()),
        (np.zeros(2), 1.5, ()),
        (np.zeros(2), True, ()),
        (np.zeros(2), 1, (1024.5,)),
        (np.zeros(2), 1, (math.nan,)),
        (np.zeros(2), 1, (-math.inf,)),
        (np.zeros(2), 1, (0.0, 0.0, 0.0)),
        (np.zeros((2, 1)), 1, ()),
        (np.zeros(2, np.int32), 1, ()),
    ],
)
def test_an_input_out_of_range_is_refused(
    update: np.ndarray, weight: int, metrics: tuple[float, ...]
) -> None:
    with pytest.raises(InputRefused):
        q.encode_update(update, weight, metrics, Coding(3, 1.0), np.random.default_rng(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"ring_bits": 20},
        {"value_bits": 1},
        {"ring_bits": 16, "value_bits": 17},
        {"parties": 0},
        {"parties": 129},
        {"max_weight": 0},
        {"max_weight": 2**31},
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"metric_limit": -1.0},
    ],
)
def test_codings_that_cannot_work_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        Coding(**({"parties": 3, "clip": 1.0} | changes))  # type: ignore[arg-type]


def test_weights_and_metrics_fit_their_lanes_at_the_edge() -> None:
    coding = Coding(100, 1.0, max_weight=(2**32 - 1) // 100)
    with pytest.raises(ParameterError):
        Coding(100, 1.0, max_weight=(2**32 - 1) // 100 + 1)
    vector = q.encode_update(
        np.zeros(0), coding.max_weight, (1024.0, -1024.0), coding, np.random.default_rng(0)
    )
    total = (vector.astype(object) * 100).tolist()
    assert total[1] < 2**32
    assert vector[2] * 100 < 2**31
    lanes = q.read_lanes(np.array([lane % 2**32 for lane in total], np.uint32), coding)
    assert lanes.metrics == pytest.approx((102400.0, -102400.0))


def test_default_codings() -> None:
    assert (q.default_coding(128, 1.0).ring_bits, q.default_coding(128, 1.0).value_bits) == (24, 17)
    assert (q.default_coding(129, 1.0).ring_bits, q.default_coding(129, 1.0).value_bits) == (32, 20)
    assert q.default_coding(2048, 1.0).parties == 2048
    with pytest.raises(ParameterError):
        q.default_coding(2049, 1.0)


def test_lanes_that_should_be_zero_are_looked_at() -> None:
    coding = Coding(3, 1.0)
    for lane in range(4, 8):
        vector = np.zeros(8, np.uint32)
        vector[lane] = 1
        assert not q.read_lanes(vector, coding).intact
