"""Simulated sites hold out a share of every class as their test rows."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fedgraft.common.examples import Indices
from fedgraft.simulations.data.sources import stratified_split


@given(
    labels=st_numpy.arrays(np.int64, st.integers(0, 80), elements=st.integers(0, 5)),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_a_stratified_split_has_a_share_of_every_class(
    labels: np.ndarray[Any, Any], share: float, seed: int
) -> None:
    def draw() -> tuple[Indices, Indices]:
        return stratified_split(labels, share, np.random.default_rng(seed))

    train, validation = draw()
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels)
    for name in set(labels):
        count = int((labels == name).sum())
        assert abs(int((labels[validation] == name).sum()) - count * share) <= 1
    assert len(validation) <= round(len(labels) * share)
    assert all((a == b).all() for a, b in zip(draw(), (train, validation), strict=True))
