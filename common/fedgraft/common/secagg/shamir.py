"""Shamir's secret sharing over GF(2^16), in numpy.

Shamir 1979, "How to share a secret". A secret of 2m bytes is m field elements, which are shared
together: each has a polynomial of degree ``threshold - 1``, whose value at 0 is the element. The
field is GF(2)[x] / (x^16 + x^12 + x^3 + x + 1). Its root x is primitive, so 65,535 parties fit.
Table look-ups do not take constant time, which another process on the same core could observe; a
secret lives for only one round.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.keys import Entropy, draw, wipe

__all__ = ["BUDGET", "Recovered", "combine", "multiply", "recover", "split"]

Elements = NDArray[np.uint16]

ORDER = 65535  # of the multiplicative group
POLYNOMIAL = 0x1100B
BUDGET = 4096  # most subsets to try for one owner's secret


def _tables() -> tuple[Elements, NDArray[np.int32]]:
    powers, logs = np.zeros(2 * ORDER, np.uint16), np.zeros(ORDER + 1, np.int32)
    value = 1
    for exponent in range(ORDER):
        powers[exponent] = value
        logs[value] = exponent
        value <<= 1
        if value > ORDER:
            value ^= POLYNOMIAL
    powers[ORDER:] = powers[:ORDER]
    return powers, logs


_POWERS, _LOGS = _tables()


def multiply(one: Elements, other: Elements) -> Elements:
    """Return the product in the field, element by element, with broadcasting."""
    product = _POWERS[_LOGS[one] + _LOGS[other]]
    return np.where((one == 0) | (other == 0), np.uint16(0), product)


def split(
    secret: bytes | bytearray, threshold: int, points: Sequence[int], entropy: Entropy
) -> list[bytearray]:
    """Return one share of ``secret`` (an even number of bytes) for each point, of the same length.

    Any ``threshold`` shares give the secret; fewer shares give no information about it. The
    function draws ``(threshold - 1) * len(secret)`` bytes from ``entropy``.

    Raises:
        ParameterError: an odd length, points that repeat or are outside 1..65535, or a threshold
            that is not in 1..len(points).
    """
    x = _points(points)
    if len(secret) % 2 or not 1 <= threshold <= len(points):
        raise ParameterError("a secret cannot be shared like this")
    drawn = draw(entropy, (threshold - 1) * len(secret))
    coefficients = np.frombuffer(drawn, "<u2").reshape(threshold - 1, len(secret) // 2)
    constant = np.frombuffer(secret, "<u2").astype(np.uint16)
    shares = np.zeros((len(x), constant.size), np.uint16)
    for row in coefficients:  # Horner, highest power first
        shares = multiply(shares ^ row, x[:, None])
    shares ^= constant
    result = [bytearray(share.astype("<u2").tobytes()) for share in shares]
    wipe(drawn)
    constant[:] = 0
    shares[:] = 0
    return result


def combine(points: Sequence[int], shares: Sequence[bytes], *, at: int = 0) -> bytes:
    """Return the value at ``at`` of the polynomials through the shares (Lagrange).

    At 0 it is the secret. All given shares are used: pass exactly ``threshold`` shares, all of the
    same even length.

    Raises:
        ParameterError: points that repeat or are outside 1..65535, or shares of different lengths.
    """
    x = _points(points)
    if len(shares) != len(x) or len({len(share) for share in shares}) != 1 or len(shares[0]) % 2:
        raise ParameterError("shares do not fit their points")
    y = np.stack([np.frombuffer(share, "<u2").astype(np.uint16) for share in shares])
    value: Elements = np.bitwise_xor.reduce(multiply(_weights(x, at)[:, None], y), axis=0)
    combined: bytes = value.astype("<u2").tobytes()
    return combined


def _points(points: Sequence[int]) -> Elements:
    if len(set(points)) != len(points) or not all(1 <= point <= ORDER for point in points):
        raise ParameterError("points of shares must be distinct and in 1..65535")
    return np.asarray(points, np.uint16)


def _weights(x: Elements, at: int) -> Elements:
    """Return the Lagrange basis at ``at``: prod_j (at - x_j) / (x_i - x_j); minus is xor here."""
    gaps = x ^ np.uint16(at)
    if not gaps.all():  # ``at`` is one of the points
        indicator: Elements = (gaps == 0).astype(np.uint16)
        return indicator
    differences = x[:, None] ^ x[None, :]
    np.fill_diagonal(differences, 1)
    logs = _LOGS[gaps].astype(np.int64)
    exponents = logs.sum() - logs - _LOGS[differences].sum(axis=1, dtype=np.int64)
    weights: Elements = _POWERS[exponents % ORDER]
    return weights


@dataclass(frozen=True)
class Recovered:
    """A secret that passed its check, and the points whose shares are not on its polynomials."""

    secret: bytes = field(repr=False)
    wrong: tuple[int, ...]


def recover(
    points: Sequence[int],
    shares: Sequence[bytes],
    threshold: int,
    accept: Callable[[bytes], bool],
    *,
    budget: int = BUDGET,
) -> Recovered | None:
    """Return the secret from shares of which some may be wrong; ``accept`` recognises the secret.

    The first ``threshold`` shares are tried, then other subsets: all subsets if there are at most
    ``budget``, otherwise ``budget`` random subsets. Random subsets find one without a wrong share
    as long as wrong shares are few. If the first subset is right, the other shares are not checked.

    Returns:
        The accepted secret and the wrong shares, or None.
    """
    for attempt, subset in enumerate(_subsets(len(points), threshold, budget)):
        chosen = [points[index] for index in subset]
        given = [shares[index] for index in subset]
        secret = combine(chosen, given)
        if not accept(secret):
            continue
        wrong = [
            point
            for point, share in zip(points, shares, strict=True)
            if attempt and combine(chosen, given, at=point) != share
        ]
        return Recovered(secret, tuple(wrong))
    return None


def _subsets(count: int, size: int, budget: int) -> Iterator[Sequence[int]]:
    if math.comb(count, size) <= budget:
        yield from combinations(range(count), size)
        return
    yield range(size)
    # Subsets need not be secret, only different: a fixed seed makes failures repeatable.
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(budget - 1):
        yield generator.permutation(count)[:size].tolist()
