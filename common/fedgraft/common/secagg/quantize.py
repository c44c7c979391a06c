"""From a float update to integers of a ring and back: clip, weigh, round, pack.

    q = floor(clip(delta, -c, c) * w / w_max * S / c + U[0, 1)),   S = 2^(value_bits - 1) - 1

Stochastic rounding is unbiased (Gupta et al. 2015, "Deep Learning with Limited Numerical
Precision"). Sums live in the ring 2^ring_bits and never wrap, because ``parties * S`` is required
to fit before a job starts. A vector is eight header lanes of 32 bits, then one element a
parameter, of which only ``ring_bits`` travel: what a site says about its examples and metrics is
masked with the rest.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.secagg.errors import InputRefused, ParameterError

__all__ = [
    "LANES",
    "METRICS",
    "Coding",
    "Lanes",
    "add_packed",
    "default_coding",
    "encode_update",
    "error_bound",
    "mean",
    "pack",
    "packed_size",
    "read_lanes",
    "signed",
]

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

LANES = 8  # count, weight, METRICS metric sums, and zeros that must still be zero after unmasking
METRICS = 2
PIECE = 1 << 15  # elements worked on at a time, so that temporaries stay in cache
RINGS = (16, 24, 32)
WORD = (1 << 32) - 1


@dataclass(frozen=True)
class Coding:
    """How numbers become ring elements; valid once it exists.

    ``clip`` bounds each coordinate of an update; ``max_weight`` a site's weight (an integer, such
    as its number of examples); ``metric_limit`` the absolute value of a metric.

    Raises:
        ParameterError: something is out of range, or a sum of ``parties`` could overflow.
    """

    parties: int
    clip: float
    ring_bits: int = 24
    value_bits: int = 17
    max_weight: int = 1 << 16
    metric_limit: float = 1024.0

    def __post_init__(self) -> None:
        if self.ring_bits not in RINGS or not 2 <= self.value_bits <= self.ring_bits:
            raise ParameterError(f"the ring must be 2^b with b in {RINGS}, and values fit in it")
        if self.parties < 1 or self.parties * self.levels > (1 << (self.ring_bits - 1)) - 1:
            raise ParameterError(
                f"sums of {self.parties} sites with {self.value_bits} bits overflow a ring of "
                f"{self.ring_bits} bits"
            )
        if self.max_weight < 1 or self.parties * self.max_weight > WORD:
            raise ParameterError("sums of weights overflow 32 bits: lower max_weight")
        for limit in (self.clip, self.metric_limit):
            # So small that levels / limit is infinite would make garbage of a zero.
            if not (0 < limit < math.inf and math.isfinite(self.levels / limit)):
                raise ParameterError("clip and metric_limit must be positive and finite")

    @property
    def levels(self) -> int:
        """S: the largest integer that one site contributes to one coordinate."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def metric_levels(self) -> int:
        """The largest integer that one site contributes to a metric lane."""
        return ((1 << 31) - 1) // self.parties


def default_coding(parties: int, clip: float) -> Coding:
    """17 bits in a ring of 24 up to 128 parties; 20 in a ring of 32 up to 2,048.

    Raises:
        ParameterError: more parties.
    """
    if parties > 2048:
        raise ParameterError("more than 2048 parties need a coding of their own")
    if parties > 128:
        return Coding(parties, clip, ring_bits=32, value_bits=20)
    return Coding(parties, clip)


def encode_update(
    update: NDArray[np.floating],
    weight: int,
    metrics: tuple[float, ...],
    coding: Coding,
    generator: np.random.Generator | None,
) -> Words:
    """Lanes and quantised ``update`` (float [d]) as uint32 [8 + d], before any mask.

    ``generator`` decides the rounding only; it must not be shared between sites. None rounds down:
    for values that are whole levels already, which then stay what they are.

    Raises:
        InputRefused: a value or metric that is not finite, a metric beyond its limit, or a weight
            outside 1..max_weight. Nothing is ever clamped but the update.
    """
    if type(weight) is not int or not 0 < weight <= coding.max_weight:
        raise InputRefused("the weight is not in 1..max_weight")
    if len(metrics) > METRICS or not all(abs(m) <= coding.metric_limit for m in metrics):
        raise InputRefused("a metric is not finite or beyond metric_limit, or there are too many")
    if update.ndim != 1 or update.dtype.kind != "f":
        raise InputRefused("the update is not a vector of floats")
    vector = np.zeros(LANES + update.size, np.uint32)
    vector[0], vector[1] = 1, weight
    scale = coding.metric_levels / coding.metric_limit
    for lane, metric in enumerate(metrics, 2):
        fixed = round(float(metric) * scale)
        vector[lane] = max(-coding.metric_levels, min(coding.metric_levels, fixed)) & WORD
    body = vector[LANES:].view(np.int32)
    for low in range(0, update.size, PIECE):
        piece = slice(low, low + PIECE)
        body[piece] = _round(update[piece], weight, coding, generator)
    return vector


def _round(
    values: NDArray[np.floating], weight: int, coding: Coding, generator: np.random.Generator | None
) -> NDArray[np.float64]:
    exact = values.astype(np.float64)  # before the clip: float32(0.1) is more than 0.1
    if not np.isfinite(exact).all():
        raise InputRefused("the update is not finite")
    np.clip(exact, -coding.clip, coding.clip, out=exact)
    exact *= weight / coding.max_weight * coding.levels / coding.clip
    if generator is not None:
        exact += generator.random(exact.size)
    np.floor(exact, out=exact)
    # Adding U < 1 to S may round up to S + 1 in floating point; one such site would overflow.
    np.clip(exact, -coding.levels, coding.levels, out=exact)
    return exact


def mean(sums: NDArray[np.int32], weight: int, coding: Coding) -> NDArray[np.float32]:
    """Weighted mean of the clipped updates, in place: float32 [d] on the memory of ``sums``."""
    step = coding.clip * coding.max_weight / (coding.levels * weight)
    means = sums.view(np.float32)
    for low in range(0, sums.size, PIECE):
        piece = slice(low, low + PIECE)
        means[piece] = np.multiply(sums[piece], step, dtype=np.float64)
    return means


def error_bound(count: int, weight: int, coding: Coding) -> float:
    """How far ``mean`` of ``count`` sites can be from the exact one, in every coordinate.

    Each site's rounding is off by less than one level, and the mean is rounded to float32.
    """
    levels = count * coding.clip * coding.max_weight / (coding.levels * weight)
    return levels + coding.clip * 2.0**-24


@dataclass(frozen=True)
class Lanes:
    """The header of an unmasked sum; ``intact`` says that the zero lanes are zero."""

    count: int
    weight: int
    metrics: tuple[float, ...]
    intact: bool


def read_lanes(vector: Words, coding: Coding) -> Lanes:
    """Read the header of uint32 [8 + d]; metrics are sums over sites."""
    scale = coding.metric_limit / coding.metric_levels
    metrics = vector[2 : 2 + METRICS].view(np.int32)
    return Lanes(
        count=int(vector[0]),
        weight=int(vector[1]),
        metrics=tuple(int(metric) * scale for metric in metrics),
        intact=not vector[2 + METRICS : LANES].any(),
    )


def signed(body: Words, ring_bits: int) -> NDArray[np.int32]:
    """Ring elements as signed integers, in place: int32 [d] on the memory of ``body``."""
    shift = np.uint32(32 - ring_bits)
    if shift:
        np.left_shift(body, shift, out=body)
    values = body.view(np.int32)
    if shift:
        np.right_shift(values, shift.astype(np.int32), out=values)
    return values


def packed_size(length: int, ring_bits: int) -> int:
    """Bytes of an upload of ``length`` parameters: 32 of header and 2, 3 or 4 a parameter."""
    return 4 * LANES + length * ring_bits // 8


def pack(vector: Words, ring_bits: int) -> Bytes:
    """The upload, uint8 [packed_size], little-endian.

    The lanes whole; then the low 16 bits of every element; then, in a ring of 24 bits, the 8 bits
    above of every element. In a ring of 32 bits elements are whole.
    """
    length = vector.size - LANES
    packed = np.empty(packed_size(length, ring_bits), np.uint8)
    packed[: 4 * LANES] = vector[:LANES].astype("<u4").view(np.uint8)
    low, high = _planes(packed, length, ring_bits)
    for start in range(0, length, PIECE):
        piece, place = vector[LANES + start :][:PIECE], slice(start, start + PIECE)
        low[place] = piece  # keeps as many low bits as fit
        if high is not None:
            high[place] = piece >> np.uint32(16)
    return packed


def _planes(
    packed: Bytes, length: int, ring_bits: int
) -> tuple[NDArray[np.unsignedinteger], Bytes | None]:
    """Views of an upload: the low bits of its elements and, for 24 bits, the 8 bits above them."""
    body = packed[4 * LANES :]
    if ring_bits == 32:
        return body.view("<u4"), None
    return body[: 2 * length].view("<u2"), body[2 * length :] if ring_bits == 24 else None


def add_packed(total: Words, packed: Bytes, ring_bits: int) -> None:
    """Add an upload to ``total`` (uint32 [8 + d]), in place.

    Bits of ``total`` above ``ring_bits`` are then meaningless; ``signed`` drops them.

    Raises:
        ParameterError: the upload has another size or dtype.
    """
    length = total.size - LANES
    size = packed_size(length, ring_bits)
    if packed.dtype != np.uint8 or packed.shape != (size,) or not packed.flags.c_contiguous:
        raise ParameterError("an upload has the wrong size or type")
    total[:LANES] += packed[: 4 * LANES].view("<u4")
    low, high = _planes(packed, length, ring_bits)
    for start in range(0, length, PIECE):
        piece, place = total[LANES + start :][:PIECE], slice(start, start + PIECE)
        piece += low[place]
        if high is not None:
            piece += high[place].astype(np.uint32) << np.uint32(16)
