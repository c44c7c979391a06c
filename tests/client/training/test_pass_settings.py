"""Sites in one pass do not meet, whatever the settings, sizes and number of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from support.companies import Company, uneven
from support.matrix import thinned, tries
from support.trainings import open_small, settings

CHANGES: list[dict[str, Any]] = [
    {"accumulation": 4},
    {"accumulation": 8, "proximal": 0.5},
    {"clip_norm": 0.05},
    {"weight_decay": 0.3},
    {"schedule": {"shape": "cosine", "warmup": 0.4}},
    {"batch_size": 3},
    {"batch_size": 64},
    {"group_by_length": True, "batch_size": 2},
    {"dropout": 0.4},
    {"dropout": 0.4, "accumulation": 2, "group_by_length": True, "clip_norm": 0.1},
]


@pytest.mark.parametrize("kind", thinned(["bert", "deep-vit", "resnet"], 3))
@pytest.mark.parametrize("changes", thinned(CHANGES, 2), ids=repr)
def test_company_makes_no_difference_under_any_setting(kind: str, changes: dict[str, Any]) -> None:
    stack = open_small(kind, dropout=0.3 if "dropout" in changes else 0.0)
    Company(stack, uneven(kind), settings(**{"epochs": 2, **changes})).check()


# Any company


@given(
    kind=st.sampled_from(["deep-vit", "resnet", "bert"]),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=5),
    batch=st.integers(1, 6),
    parts=st.integers(1, 3),
    epochs=st.integers(1, 2),
    grouped=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
)
@limits(max_examples=tries(25), deadline=None, derandomize=True)
def test_any_company_makes_no_difference(
    kind: str,
    sizes: list[int],
    batch: int,
    parts: int,
    epochs: int,
    grouped: bool,
    dropout: float,
) -> None:
    wanted = settings(
        batch_size=batch * parts, accumulation=parts, epochs=epochs, group_by_length=grouped,
        dropout=dropout,
    )  # fmt: skip
    Company(open_small(kind, dropout=dropout), uneven(kind, sizes), wanted).check()
