"""Features are what the body itself gives, whichever architecture; kept ones are the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.trainings import KINDS, open_small, rows_for

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.selection import features
from fedgraft.client.selection.features import blocks_of, features_of
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Examples


def opened(kind: str) -> Stack:
    return open_small(kind, kind="head")


@torch.no_grad()
def by_transformers(stack: Stack, examples: Examples, row: int) -> Any:
    """The features of one example, alone and without padding, straight from the body."""
    model: Any = stack.bench.model.get_base_model()
    inputs = as_tensors(examples.batch(np.array([row])))
    if "pixel_values" not in inputs:
        return model.base_model(**inputs).last_hidden_state[0].mean(0)
    output = model.base_model(**inputs)
    hidden = output.last_hidden_state
    return output.pooler_output[0].flatten() if hidden.ndim == 4 else hidden[0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_body(kind: str) -> None:
    stack, examples = opened(kind), rows_for(kind, 70)
    found = features_of(stack, examples)
    assert found.values.dtype == np.float32
    for row in (0, 33, 69):
        known = by_transformers(stack, examples, row).numpy()
        np.testing.assert_allclose(found.values[row], known, rtol=1e-3, atol=1e-4)


def test_only_a_head_of_its_own_predicts() -> None:
    with_head, without = opened("vit"), opened("deep-vit")
    examples = rows_for("vit", 20)
    index = np.arange(20)
    with torch.no_grad():
        known = with_head.logits(as_tensors(examples.batch(index))).softmax(-1).numpy()
    np.testing.assert_allclose(features_of(with_head, examples).probabilities, known, atol=1e-6)
    assert features_of(without, examples).probabilities.shape == (20, 0)


def test_kept_features_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, examples = opened("bert"), rows_for("bert", 50)
    store = Store(tmp_path, memory=10**8, disk=10**8)
    monkeypatch.setattr(features, "BLOCK", 20)
    first = list(blocks_of(stack, examples, store))
    assert [len(block.labels) for block in first] == [20, 20, 10]
    monkeypatch.setattr(features, "features_of", None)
    again = list(blocks_of(stack, examples, store))
    whole = np.concatenate([block.values for block in again])
    assert whole.tobytes() == np.concatenate([block.values for block in first]).tobytes()
    assert np.concatenate([block.labels for block in again]).tolist() == examples.labels.tolist()


def test_blocks_give_what_all_at_once_gives(tmp_path: Path) -> None:
    stack, examples = opened("roberta"), rows_for("roberta", 30)
    store = Store(tmp_path, memory=10**8, disk=10**8)
    (block,) = blocks_of(stack, examples, store)
    np.testing.assert_array_equal(block.values, features_of(stack, examples).values)


def test_features_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = opened("resnet")

    def broken(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((8, 3), torch.nan), torch.zeros(8, 2)

    monkeypatch.setattr(features, "_forward", broken)
    with pytest.raises(BackboneError, match="not finite"):
        features_of(stack, rows_for("resnet", 8))
