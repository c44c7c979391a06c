"""Dropout acts where something trains, in training only, from numbers of the site's own."""

import numpy as np
import pytest
import torch
from support.trainings import digits, noisy, open_small, rows_for, settings, texts, trained

from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.batched_modules import Draws, Rows, SiteDropout
from fedgraft.client.training.evaluate import evaluate
from fedgraft.common.config.training import Training
from fedgraft.common.examples import Examples
from fedgraft.common.metrics.evaluation import Measures

STILL = 1e-12  # a learning rate at which nothing moves


def _losses(stack: Stack, examples: Examples, wanted: Training) -> tuple[float, float]:
    """The mean loss as training saw it and as evaluation measures it afterwards."""
    seen = trained(stack, examples, wanted).loss
    layout, vector = stack.bench.layout, noisy(stack.bench)
    measured, again = (
        evaluate(stack, layout, vector, examples, measures=Measures(10)) for _ in range(2)
    )
    assert measured.tally.loss == again.tally.loss
    return seen, measured.tally.mean_loss


@pytest.mark.parametrize("kind", ["vit", "resnet", "gpt2"])
def test_dropout_acts_on_the_low_rank_path_in_training_only(kind: str) -> None:
    still, examples = settings(learning_rate=STILL), rows_for(kind, 24)
    seen, measured = _losses(open_small(kind, dropout=0.0), examples, still)
    assert seen == pytest.approx(measured, abs=1e-5)
    dropped, after = _losses(open_small(kind, dropout=0.5), examples, still)
    assert abs(dropped - after) > 1e-3
    assert after == pytest.approx(measured, abs=1e-5)  # evaluation is as if there were none


@pytest.mark.parametrize("kind", ["bert", "roberta"])  # their configs ask for dropout everywhere
def test_dropout_in_the_head_is_the_jobs_and_the_backbone_has_none(kind: str) -> None:
    stack = open_small(kind)
    seen, measured = _losses(stack, texts(), settings(learning_rate=STILL, dropout=0.0))
    assert seen == pytest.approx(measured, abs=1e-4)
    dropped, after = _losses(stack, texts(), settings(learning_rate=STILL, dropout=0.5))
    assert abs(dropped - after) > 1e-3
    assert after == pytest.approx(measured, abs=1e-5)
    # And off again: the one before left nothing behind.
    seen, _ = _losses(stack, texts(), settings(learning_rate=STILL, dropout=0.0))
    assert seen == pytest.approx(measured, abs=1e-4)


def test_a_model_without_dropout_in_its_head_has_none() -> None:
    stack, still = open_small("vit"), settings(learning_rate=STILL, dropout=0.5)
    seen, measured = _losses(stack, digits(), still)
    assert seen == pytest.approx(measured, abs=1e-5)


# One layer


def drawing(*rows: tuple[int, int, bool], width: int = 0, head: float = 0.0) -> Draws:
    """What is random in a pass of sites with (rows, width, padding before) each."""
    every = tuple(
        Rows(count, wide, left, torch.Generator().manual_seed(site))
        for site, (count, wide, left) in enumerate(rows)
    )
    return Draws(len(rows), every, width, head)


def test_dropout_keeps_the_mean() -> None:
    out = SiteDropout(drawing((1000, 0, False)), 0.25)(torch.ones(1000, 100))
    assert sorted(set(out.flatten().tolist())) == [0.0, pytest.approx(4 / 3)]
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert SiteDropout(Draws(), 0.25)(torch.ones(5, 1)).flatten().tolist() == [1] * 5


def test_the_heads_dropout_is_that_of_the_pass() -> None:
    draws = drawing((10, 0, False), head=0.0)
    assert SiteDropout(draws, None)(torch.ones(10, 10)).eq(1).all()
    draws.head = 0.5
    assert set(SiteDropout(draws, None)(torch.ones(10, 10)).flatten().tolist()) == {0.0, 2.0}


def test_only_real_rows_and_tokens_are_drawn_for() -> None:
    x = torch.ones(3 * 4, 6, 50)
    draws = drawing((4, 6, False), (2, 3, False), (1, 2, True), width=6)
    out = SiteDropout(draws, 0.5)(x)
    scaled = {name: set(part.flatten().tolist()) for name, part in {
        "all of the first": out[:4],
        "rows of the second": out[4:6, :3],
        "row of the third": out[8:9, 4:],
    }.items()}  # fmt: skip
    assert all(values == {0.0, 2.0} for values in scaled.values()), scaled
    untouched = [out[4:6, 3:], out[6:8], out[8:9, :4], out[9:]]
    assert all(part.eq(2).all() for part in untouched)


@pytest.mark.parametrize("left", [False, True])
def test_a_site_draws_the_same_in_any_company(left: bool) -> None:
    mine = (2, 3, left)
    alone = SiteDropout(drawing(mine, width=3), 0.5)(torch.ones(2, 3, 40))
    padded = SiteDropout(drawing(mine, (4, 7, left), width=7), 0.5)(torch.ones(8, 7, 40))
    inside = padded[:2, 4:] if left else padded[:2, :3]
    assert torch.equal(inside, alone)
    # What comes next is then drawn alike, too.
    draws = [drawing(mine, width=3), drawing(mine, (4, 7, left), width=7)]
    shapes = [(2, 3, 40), (8, 7, 40)]
    for one, shape in zip(draws, shapes, strict=True):
        SiteDropout(one, 0.5)(torch.ones(shape))
    following = [torch.rand(5, generator=one.rows[0].generator) for one in draws]
    assert torch.equal(*following)


def test_a_layer_whose_second_dimension_is_no_token_drops_all_of_it() -> None:
    # A pooled row [rows, features] of as many features as the batch has tokens is no sequence.
    out = SiteDropout(drawing((3, 2, False), width=8), 0.5)(torch.ones(3, 8))
    assert np.isin(out.numpy(), [0, 2]).all() and (out[:, 2:] == 0).any()
