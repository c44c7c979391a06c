"""Shamir: the field, any threshold of shares, nothing from fewer, wrong shares found."""

import os
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg import reference as slow
from support.matrix import tries

from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.shamir import combine, multiply, recover, split

element = st.integers(0, 65535)


@given(element, element)
def test_products_are_those_of_the_field(a: int, b: int) -> None:
    product = multiply(np.array([a], np.uint16), np.array([b], np.uint16))
    assert int(product[0]) == slow.field_multiply(a, b)


@settings(max_examples=tries(25), deadline=None)
@given(st.data())
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    points = data.draw(st.lists(st.integers(1, 65535), min_size=count, max_size=count, unique=True))
    secret = data.draw(st.binary(min_size=2, max_size=8).filter(lambda s: len(s) % 2 == 0))
    shares = [bytes(share) for share in split(secret, threshold, points, os.urandom)]
    chosen = data.draw(st.permutations(range(count)))[:threshold]
    some = [points[i] for i in chosen], [shares[i] for i in chosen]
    assert combine(*some) == secret == slow.shamir_combine(*some)
    for point, share in zip(points, shares, strict=True):
        assert combine(*some, at=point) == share


def test_shares_are_those_of_the_slow_reference() -> None:
    drawn = bytes(range(128))
    secret, points = bytes(range(100, 164)), (1, 2, 65535, 300)
    shares = split(secret, 3, points, lambda size: drawn[:size])
    assert shares == slow.shamir_split(secret, 3, points, drawn)


def test_fewer_shares_fit_every_secret_equally() -> None:
    """Two of three shares: for each candidate secret exactly one polynomial passes through."""
    points = (1, 2, 3)
    shares = [bytes(s) for s in split(b"\x12\x34", 3, points, os.urandom)]
    seen = {
        combine((1, 2, 5), (shares[0], shares[1], guess.to_bytes(2, "little")))
        for guess in range(0, 65536, 16)
    }
    assert len(seen) == 4096


def test_shares_without_entropy_would_be_the_secret() -> None:
    """Coefficients come from the source that is given, all of them."""
    asked = []

    def zeros(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    assert split(b"ab", 3, (1, 2, 3), zeros) == [b"ab"] * 3
    assert asked == [4]


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (b"abc", 1, (1, 2)),
        (b"ab", 0, (1, 2)),
        (b"ab", 3, (1, 2)),
        (b"ab", 2, (1, 1)),
        (b"ab", 2, (0, 1)),
        (b"ab", 2, (1, 65536)),
    ],
)
def test_impossible_sharings_are_refused(
    secret: bytes, threshold: int, points: tuple[int, ...]
) -> None:
    with pytest.raises(ParameterError):
        split(secret, threshold, points, os.urandom)


@pytest.mark.parametrize("shares", [(b"ab",), (b"ab", b"abcd"), (b"a", b"b")])
def test_shares_that_do_not_fit_are_refused(shares: tuple[bytes, ...]) -> None:
    with pytest.raises(ParameterError):
        combine((1, 2), shares)


@pytest.mark.parametrize("wrong", [(), (0,), (1, 4), (0, 1, 2)])
def test_wrong_shares_are_worked_around_and_named(wrong: tuple[int, ...]) -> None:
    points = (1, 2, 3, 4, 5, 6)
    shares = [bytes(s) for s in split(b"secret", 3, points, os.urandom)]
    for index in wrong:
        shares[index] = bytes(b ^ 1 for b in shares[index])
    found = recover(points, shares, 3, lambda s: s == b"secret")
    assert found is not None
    assert found.secret == b"secret"
    assert found.wrong == tuple(points[index] for index in wrong)
    assert "secret'" not in repr(found)


def test_too_many_wrong_shares_give_nothing() -> None:
    shares = [bytes(s) for s in split(b"secret", 3, range(1, 6), os.urandom)]
    shares[:3] = [b"wrong!"] * 3
    assert recover(range(1, 6), shares, 3, lambda s: s == b"secret") is None


def test_a_large_group_is_searched_within_a_budget() -> None:
    points = range(1, 41)
    shares = [bytes(s) for s in split(b"secret", 21, points, os.urandom)]
    bad = (0, 7, 11, 30)
    for index in bad:
        shares[index] = b"wrong!"
    found = recover(points, shares, 21, lambda s: s == b"secret")
    assert found is not None
    assert found.wrong == tuple(index + 1 for index in bad)
    tried: list[bytes] = []

    def refuse(secret: bytes) -> bool:
        tried.append(secret)
        return False

    assert recover(points, shares, 21, refuse, budget=3) is None
    assert len(tried) == 3


def test_every_pair_of_three() -> None:
    shares = [bytes(s) for s in split(bytes(64), 2, (1, 2, 3), os.urandom)]
    for pair in combinations(range(3), 2):
        assert combine([i + 1 for i in pair], [shares[i] for i in pair]) == bytes(64)
