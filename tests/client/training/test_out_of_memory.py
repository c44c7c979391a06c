"""A device whose memory is short trains the same in smaller pieces, or says that it cannot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.trainings import digits, open_small, settings, trained

from fedgraft.client.model import forward as feed
from fedgraft.client.model.forward import logits_of
from fedgraft.common.errors import SiteFailure

Limit = Callable[[int], list[int]]


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Have a pass with more than so many rows run out of memory, once its dropout is drawn."""

    def limit(rows: int) -> list[int]:
        tried: list[int] = []

        def short(feeds: Any, indices: Any, width: int, vary: Any) -> torch.Tensor:
            tried.append(len(indices[0]))
            logits = logits_of(feeds, indices, width, vary)
            if len(indices[0]) > rows:
                raise torch.OutOfMemoryError
            return logits

        monkeypatch.setattr(feed, "logits_of", short)
        return tried

    return limit


def test_halved_it_trains_what_it_would_have(memory_for: Limit) -> None:
    stack, examples, wanted = open_small("vit"), digits(), settings(epochs=2)
    enough = trained(stack, examples, wanted)
    tried = memory_for(3)
    short = trained(stack, examples, wanted)
    assert tried[:3] == [8, 4, 2] and max(tried[3:]) == 2  # found out once
    np.testing.assert_allclose(short.vector, enough.vector, rtol=0, atol=1e-6)
    assert short.loss == pytest.approx(enough.loss, abs=1e-6)
    assert short.steps == enough.steps == 6


def test_what_failed_leaves_no_trace_not_even_in_what_is_drawn(memory_for: Limit) -> None:
    stack, examples = open_small("vit", dropout=0.3), digits()
    dropped = {"dropout": 0.3, "epochs": 2}
    asked = trained(stack, examples, settings(accumulation=4, **dropped))
    memory_for(2)
    short = trained(stack, examples, settings(**dropped))
    assert short.vector.tobytes() == asked.vector.tobytes()
    assert short.loss == asked.loss


def test_where_one_row_is_too_much_the_site_says_so(memory_for: Limit) -> None:
    stack, examples = open_small("vit"), digits()
    before = trained(stack, examples, settings())
    tried = memory_for(0)
    with pytest.raises(SiteFailure, match="out-of-memory"):
        trained(stack, examples, settings())
    assert tried == [8, 4, 2, 1]
    memory_for(8)
    assert trained(stack, examples, settings()).vector.tobytes() == before.vector.tobytes()
