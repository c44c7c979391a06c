"""Long lists of cases: `make test` runs some of them, `make test-all` runs all."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import settings

__all__ = ["slow_unless", "thinned", "tries"]


def tries(whole: int) -> int:
    """Return how many examples Hypothesis tries: ``whole`` in `make test-all`, else a part."""
    return max(whole * settings().max_examples // 100, 10)


def thinned(cases: Iterable[Any], step: int) -> list[Any]:
    """Return the cases as parameters; the first and then each ``step``-th is not slow."""
    listed = list(cases)
    return slow_unless(listed, lambda case: listed.index(case) % step == 0)


def slow_unless(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """Return the cases as parameters, those marked slow for which ``quick`` is false."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if quick(case) else pytest.mark.slow,
        )
        for case in cases
    ]
