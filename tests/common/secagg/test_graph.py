"""Graph: thresholds, the computed degrees, and a circle on which everyone agrees."""

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.graph import Graph, _connected, _rare, arrange, plan_graph


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout", "degree", "threshold"),
    [(200, 20, 40, 42, 20), (500, 50, 100, 56, 27), (1000, 100, 200, 62, 30)],
)
def test_degree_and_threshold_of_the_specification(
    n: int, corrupt: int, dropout: int, degree: int, threshold: int
) -> None:
    plan = plan_graph(n, corrupt, dropout)
    assert (plan.degree, plan.share_threshold) == (degree, threshold)


def test_degree_with_a_third_corrupt_and_a_third_dropped() -> None:
    plan = plan_graph(1000, 330, 330)
    assert (plan.degree, plan.share_threshold) == (278, 147)


def test_the_degree_is_the_smallest_that_will_do() -> None:
    """Against exact fractions, without the recurrence."""

    def tail(population: int, marked: int, drawn: int, least: int) -> Fraction:
        ways = sum(
            comb(marked, j) * comb(population - marked, drawn - j) for j in range(least, drawn + 1)
        )
        return Fraction(ways, comb(population, drawn))

    def fits(k: int) -> int:
        for t in range(1, k + 2):
            if 200 * tail(199, 20, k, t) < Fraction(1, 2**40):
                good = 200 * tail(199, 40, k, k + 2 - t) < Fraction(1, 2**20)
                return t if good else 0
        return 0

    assert fits(42) == 20
    assert not any(fits(k) for k in range(4, 42, 2))


def test_tails_that_cannot_happen_and_those_that_must() -> None:
    assert _rare(1, 10, 3, 5, 4, 400)  # only three are marked
    assert not _rare(1, 10, 8, 5, 1, 1)  # at least three of any five are marked
    assert _connected(200, 3, 2)  # three bad ones cannot make two gaps of two
    assert not _connected(200, 150, 2)


@pytest.mark.parametrize(("n", "t"), [(3, 2), (4, 3), (5, 3), (7, 4), (128, 65)])
def test_small_federations_are_complete(n: int, t: int) -> None:
    plan = plan_graph(n, 1, 0)
    assert (plan.degree, plan.share_threshold) == (n - 1, t)
    assert plan.sign_threshold == (n + 1) // 2 + 1
    assert plan_graph(5, 3, 0).share_threshold == 4
    assert plan_graph(5, 3, 0).fewest_survivors == 5


@pytest.mark.parametrize("n", range(3, 40))
def test_two_survivor_sets_cannot_both_be_signed(n: int) -> None:
    for corrupt in range(1, n - 1):
        plan = plan_graph(n, corrupt, 0)
        assert 2 * plan.sign_threshold - n > corrupt  # an honest site would have to sign twice
        assert plan.share_threshold > corrupt
        assert plan.share_threshold <= plan.sign_threshold <= n


def test_sparse_where_nothing_sparse_will_do_is_complete() -> None:
    plan = plan_graph(129, 125, 1)
    assert plan.degree == 128
    assert plan.share_threshold == 126


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout"),
    [(2, 1, 0), (4, 0, 0), (4, 3, 0), (3, 1, 1), (10, 1, -1), (10, 1, 5)],
)
def test_impossible_federations_are_refused(n: int, corrupt: int, dropout: int) -> None:
    with pytest.raises(ParameterError):
        plan_graph(n, corrupt, dropout)


def test_the_plan_follows_those_who_advertised() -> None:
    plan = plan_graph(10, 2, 3)
    assert plan.among(8).degree == 7
    assert plan.among(8).share_threshold == plan.share_threshold
    sparse = plan_graph(200, 20, 40)
    assert sparse.among(200) == sparse
    fewer = sparse.among(150)  # all 20 may be among the 150 that are left
    assert fewer.sign_threshold == sparse.sign_threshold
    assert fewer.share_threshold > sparse.share_threshold
    assert sparse.among(120).degree == 119
    for left in (110, 201):
        with pytest.raises(ParameterError):
            sparse.among(left)


@given(
    ids=st.sets(st.integers(0, 5000), min_size=5, max_size=60),
    seed=st.binary(min_size=32, max_size=32),
    half=st.integers(1, 40),
)
def test_neighbours_are_mutual_and_of_the_degree(ids: set[int], seed: bytes, half: int) -> None:
    graph = arrange(ids, seed, 2 * half)
    assert graph == arrange(sorted(ids, reverse=True), seed, 2 * half)
    size = min(2 * half, len(ids) - 1)
    for site in ids:
        around = graph.neighbours(site)
        assert len(set(around)) == len(around) == size
        assert list(around) == sorted(around)
        assert site not in around
        assert set(graph.holders(site)) == {site, *around}
        assert all(site in graph.neighbours(other) for other in around)


def test_the_circle_depends_on_the_advertisements() -> None:
    assert arrange(range(200), bytes(32), 8).order != arrange(range(200), b"\1" * 32, 8).order


def test_who_is_not_on_the_circle_has_no_neighbours() -> None:
    with pytest.raises(ParameterError):
        Graph((1, 2, 3), 2).neighbours(4)
