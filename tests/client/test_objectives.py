"""Losses and counts of labels and of tokens."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedgraft.client.objectives import OBJECTIVES, distances, restrict
from fedgraft.common.examples import IGNORED, TextExamples
from fedgraft.common.tasks.causal_lm import Blocks

LABELS, TOKENS = OBJECTIVES["label"], OBJECTIVES["tokens"]


def texts(*lengths: int, left: bool = False) -> Blocks:
    count = np.array(lengths, np.int64)
    documents = TextExamples(
        labels=np.zeros(len(count), np.int64),
        ids=np.arange(1, count.sum() + 1, dtype=np.int32),
        starts=np.cumsum(count) - count,
        lengths=count,
        types=None,
        pad_id=0,
        pad_left=left,
        longest=8,
    )
    return Blocks(documents, np.arange(len(count)))


@pytest.mark.parametrize("left", [False, True])
def test_each_token_is_to_predict_the_next(left: bool) -> None:
    targets = torch.from_numpy(texts(4, 2, left=left).targets(np.arange(2)))
    last = [IGNORED, IGNORED, 6, IGNORED] if left else [6, IGNORED, IGNORED, IGNORED]
    assert targets.tolist() == [[2, 3, 4, IGNORED], last]


def test_the_loss_of_a_sequence_is_the_sum_over_its_targets() -> None:
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(texts(4, 2).targets(np.arange(2)))
    first = functional.cross_entropy(logits[0, :3], targets[0, :3], reduction="sum")
    second = functional.cross_entropy(logits[1, :1], targets[1, :1])
    found = TOKENS.losses(logits, targets)
    torch.testing.assert_close(found.summed, torch.stack([first, second]))
    assert found.targets.tolist() == [3, 1]


def test_a_text_of_one_token_has_no_target_and_no_loss() -> None:
    targets = torch.from_numpy(texts(1).targets(np.arange(1)))
    found = TOKENS.losses(torch.randn(1, 1, 9), targets)
    assert (found.summed.tolist(), found.targets.tolist()) == ([0.0], [0])
    counts = TOKENS.counts(torch.randn(1, 1, 9), targets)
    assert {name: part.tolist() for name, part in counts.items()} == {
        "losses": [0.0],
        "right": [0],
        "counted": [0],
        "true": [[IGNORED]],
        "predicted": [[IGNORED]],
    }


def test_tokens_are_counted_as_right_or_wrong_block_by_block() -> None:
    targets = torch.from_numpy(texts(4, 2).targets(np.arange(2)))
    logits = functional.one_hot(targets.clamp(min=0), 9).float() * 20
    logits[0, 1] = logits[0, 0]  # says 2 where 3 comes
    counts = TOKENS.counts(logits, targets)
    assert (counts["right"].tolist(), counts["counted"].tolist()) == ([2, 1], [3, 1])
    assert counts["losses"].tolist() == pytest.approx([20, 0], abs=1e-3)
    assert counts["true"].tolist() == targets.tolist()
    assert counts["predicted"].tolist() == [[2, 2, 4, IGNORED], [6, IGNORED, IGNORED, IGNORED]]


def test_labels_are_counted_as_they_are() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    counts = LABELS.counts(logits, torch.tensor([0, 1]))
    assert (counts["true"].tolist(), counts["predicted"].tolist()) == ([0, 1], [0, 0])
    wanted = float(LABELS.losses(logits, torch.tensor([0, 1])).summed.sum())
    assert counts["loss"] == pytest.approx(wanted)
    assert counts["logits"].tolist() == logits.tolist()


# Smoothing, several heads, a teacher


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_smoothing_is_that_of_pytorch() -> None:
    logits, targets = drawn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    wanted = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.3)
    found = LABELS.losses(logits, targets, smoothing=0.3)
    torch.testing.assert_close(found.summed, wanted)
    assert found.targets.tolist() == [1] * 6
    plain = LABELS.losses(logits, targets, smoothing=0.0)
    assert torch.equal(LABELS.losses(logits, targets).summed, plain.summed)


def test_tokens_that_do_not_count_are_not_smoothed() -> None:
    logits, targets = drawn(2, 4, 9), torch.from_numpy(texts(4, 2).targets(np.arange(2)))
    first = functional.cross_entropy(logits[0, :3], targets[0, :3], label_smoothing=0.2)
    second = functional.cross_entropy(logits[1, :1], targets[1, :1], label_smoothing=0.2)
    found = TOKENS.losses(logits, targets, smoothing=0.2)
    torch.testing.assert_close(found.summed, torch.stack([3 * first, second]))
    unlabelled = torch.tensor([IGNORED, 1])
    assert LABELS.losses(drawn(2, 3), unlabelled, smoothing=0.2).summed[0] == 0


def test_a_row_of_several_heads_sees_only_its_own() -> None:
    heads, targets = (0, 1, 0, 1, 1), torch.tensor([0, 1, 4])
    logits = drawn(3, 5)
    found = restrict(logits, targets, heads)
    assert found.argmax(-1).tolist()[0] in (0, 2)
    own = logits[1:, [1, 3, 4]]
    for smoothing in (0.0, 0.3):
        wanted = functional.cross_entropy(
            own, torch.tensor([0, 2]), reduction="none", label_smoothing=smoothing
        )
        told = LABELS.losses(found, targets, smoothing=smoothing).summed[1:]
        torch.testing.assert_close(told, wanted)
    assert restrict(logits, targets, ()) is logits
    unlabelled = torch.tensor([IGNORED, 1, IGNORED])
    kept = (restrict(logits, unlabelled, heads) > -torch.inf).sum(1)
    assert kept.tolist() == [5, 3, 5]  # without a label nobody knows the head


def test_gradients_stay_within_a_rows_head() -> None:
    logits, targets = drawn(2, 4).requires_grad_(True), torch.tensor([0, 3])
    heads = (0, 0, 1, 1)
    taught = restrict(drawn(2, 4, seed=1), targets, heads)
    own = restrict(logits, targets, heads)
    total = LABELS.losses(own, targets, smoothing=0.1).summed.sum()
    total = total + distances(own, taught, 3.0).sum()
    (gradient,) = torch.autograd.grad(total, [logits])
    assert torch.isfinite(gradient).all()
    assert gradient[0, 2:].tolist() == gradient[1, :2].tolist() == [0, 0]
    assert gradient[0, :2].abs().min() > 0 and gradient[1, 2:].abs().min() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_distance_to_a_teacher_is_the_scaled_divergence(temperature: float) -> None:
    logits, taught = drawn(4, 3), drawn(4, 3, seed=1)
    p, q = ((one / temperature).softmax(-1).double() for one in (taught, logits))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(
        distances(logits, taught, temperature).double(), wanted, rtol=1e-4, atol=1e-6
    )
    assert distances(taught, taught, temperature).abs().max() < 1e-6
