"""Conversion of a float update to integers of a ring, and back: clip, weight, round, pack.

    q = floor(clip(delta, -c, c) * w / w_max * S / c + U[0, 1)),   S = 2^(value_bits - 1) - 1

Stochastic rounding is unbiased (Gupta et al. 2015, "Deep Learning with Limited Numerical
Precision"). Sums are in the ring 2^ring_bits and never wrap, because ``parties * S`` must fit
before a job starts. A vector is eight header lanes of 32 bits, followed by one element per
parameter, of which only ``ring_bits`` are sent. A site's example count and metrics are in the
lanes, so they are masked together with the update.
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

LANES = 8  # count, weight, METRICS metric sums, and zeros that must be zero after unmasking
METRICS = 2
PIECE = 1 << 15  # elements per step, so that temporaries stay in cache
RINGS = (16, 24, 32)
WORD = (1 << 32) - 1


@dataclass(frozen=True)
class Coding:
    """The conversion of numbers to ring elements; an existing object is valid.

    ``clip`` limits each coordinate of an update. ``max_weight`` limits a site's weight (an integer,
    such as its number of examples). ``metric_limit`` limits the absolute value of a metric.

    Raises:
        ParameterError: a value is out of range, or a sum of ``parties`` could overflow.
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
            # If levels / limit were infinite, a zero would become a wrong value.
            if not (0 < limit < math.inf and math.isfinite(self.levels / limit)):
                raise ParameterError("clip and metric_limit must be positive and finite")

    @property
    def levels(self) -> int:
        """Return S: the largest integer that one site contributes to one coordinate."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def metric_levels(self) -> int:
        """Return the largest integer that one site contributes to a metric lane."""
        return ((1 << 31) - 1) // self.parties


def default_coding(parties: int, clip: float) -> Coding:
    """Return 17 bits in a ring of 24 up to 128 parties; 20 bits in a ring of 32 up to 2,048.

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
    """Return lanes and quantised ``update`` (float [d]) as uint32 [8 + d], before any mask.

    ``generator`` decides only the rounding; sites must not share it. None is for counts, which are
    whole levels already: they stay as they are, and none is clipped.

    Raises:
        InputRefused: a value or metric that is not finite, a metric or a count beyond its limit, or
            a weight outside 1..max_weight. Only an update is clipped; no other value is.
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
    exact = values.astype(np.float64)  # before the clip, because float32(0.1) > 0.1
    if not np.isfinite(exact).all():
        raise InputRefused("the update is not finite")
    if generator is None and (np.abs(exact) > coding.clip).any():
        raise InputRefused(
            "a count is larger than the largest that sums of all sites have room for"
        )
    np.clip(exact, -coding.clip, coding.clip, out=exact)
    exact *= weight / coding.max_weight * coding.levels / coding.clip
    if generator is not None:
        exact += generator.random(exact.size)
    np.floor(exact, out=exact)
    # S + U with U < 1 can round up to S + 1 in floating point; one such site could cause overflow.
    np.clip(exact, -coding.levels, coding.levels, out=exact)
    return exact


def mean(sums: NDArray[np.int32], weight: int, coding: Coding) -> NDArray[np.float32]:
    """Return the weighted mean of the clipped updates, float32 [d], in the memory of ``sums``."""
    step = coding.clip * coding.max_weight / (coding.levels * weight)
    means = sums.view(np.float32)
    for low in range(0, sums.size, PIECE):
        piece = slice(low, low + PIECE)
        means[piece] = np.multiply(sums[piece], step, dtype=np.float64)
    return means


def error_bound(count: int, weight: int, coding: Coding) -> float:
    """Return the largest error of ``mean`` over ``count`` sites, in every coordinate.

    The rounding error of each site is less than one level, and the mean is rounded to float32.
    """
    levels = count * coding.clip * coding.max_weight / (coding.levels * weight)
    return levels + coding.clip * 2.0**-24


@dataclass(frozen=True)
class Lanes:
    """The header of an unmasked sum; ``intact``: the zero lanes are zero."""

    count: int
    weight: int
    metrics: tuple[float, ...]
    intact: bool


def read_lanes(vector: Words, coding: Coding) -> Lanes:
    """Return the header of uint32 [8 + d]; metrics are sums over sites."""
    scale = coding.metric_limit / coding.metric_levels
    metrics = vector[2 : 2 + METRICS].view(np.int32)
    return Lanes(
        count=int(vector[0]),
        weight=int(vector[1]),
        metrics=tuple(int(metric) * scale for metric in metrics),
        intact=not vector[2 + METRICS : LANES].any(),
    )


def signed(body: Words, ring_bits: int) -> NDArray[np.int32]:
    """Return ring elements as signed integers: int32 [d] in the memory of ``body``."""
    shift = np.uint32(32 - ring_bits)
    if shift:
        np.left_shift(body, shift, out=body)
    values = body.view(np.int32)
    if shift:
        np.right_shift(values, shift.astype(np.int32), out=values)
    return values


def packed_size(length: int, ring_bits: int) -> int:
    """Return the bytes of an upload of ``length`` parameters.

    The header has 32 bytes; a parameter has 2, 3 or 4 bytes.
    """
    return 4 * LANES + length * ring_bits // 8


def pack(vector: Words, ring_bits: int) -> Bytes:
    """Return the upload, uint8 [packed_size], little-endian.

    The order is: the whole lanes; the low 16 bits of every element; and, in a ring of 24 bits, the
    next 8 bits of every element. In a ring of 32 bits elements are stored whole.
    """
    length = vector.size - LANES
    packed = np.empty(packed_size(length, ring_bits), np.uint8)
    packed[: 4 * LANES] = vector[:LANES].astype("<u4").view(np.uint8)
    low, high = _planes(packed, length, ring_bits)
    for start in range(0, length, PIECE):
        piece, place = vector[LANES + start :][:PIECE], slice(start, start + PIECE)
        low[place] = piece  # the cast keeps the low bits
        if high is not None:
            high[place] = piece >> np.uint32(16)
    return packed


def _planes(
    packed: Bytes, length: int, ring_bits: int
) -> tuple[NDArray[np.unsignedinteger], Bytes | None]:
    """Return views of an upload: the low bits of its elements and, for 24 bits, the next 8 bits."""
    body = packed[4 * LANES :]
    if ring_bits == 32:
        return body.view("<u4"), None
    return body[: 2 * length].view("<u2"), body[2 * length :] if ring_bits == 24 else None


def add_packed(total: Words, packed: Bytes, ring_bits: int) -> None:
    """Add an upload to ``total`` (uint32 [8 + d]), in place.

    Bits of ``total`` above ``ring_bits`` then have no meaning; ``signed`` drops them.

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
