"""Was federating worth it for one site, where tokens or patches are predicted: blocks are compared.

The tokens of a block depend on one another: one word that a model does not know costs it several.
To take each token for a draw of its own would make every interval far too narrow. So blocks are
redrawn, each with all of its tokens: a cluster bootstrap with percentile intervals (Cameron,
Gelbach and Miller 2008, "Bootstrap-Based Improvements for Inference with Clustered Errors", Review
of Economics and Statistics 90). Both models read the same blocks, and what is compared is the loss
in nats per token; perplexity is e to the power of it. An image is a block too, of hidden patches,
and its loss the mean absolute error. The test flips at random which model a
block's losses belong to (a paired permutation test; Good 2005, "Permutation, Parametric, and
Bootstrap Tests of Hypotheses").

Blocks are treated as independent draws. Neighbouring blocks of one document are not quite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgraft.common.metrics.label_outcome import LEVEL, Outcome, Rival
from fedgraft.common.tasks import METRICS, Target

__all__ = ["BlockVerdict", "block_verdict", "part_intervals"]

DRAWS = 1000
NEGATIVE = " This is negative transfer."
AT_ONCE = 1 << 22  # redrawn blocks in memory

Blocks = npt.NDArray[Any]


@dataclass(frozen=True)
class _Words:
    """How a mean loss is shown, a difference of two said, and blocks counted."""

    value: Callable[[float], float]
    difference: str
    one: str
    many: str


_WORDS: dict[Target, _Words] = {
    "tokens": _Words(
        lambda loss: math.exp(min(loss, 700.0)),
        "loss {:+.3f} nats a token",
        "1 block of text",
        "blocks of text",
    ),
    "patches": _Words(lambda loss: loss, "error {:+.3f} a pixel", "1 image", "images"),
}


@dataclass(frozen=True)
class BlockVerdict:
    """What the comparison says; differences are federated minus the other, in nats per token.

    Of images: in mean absolute error of a hidden pixel.

    Below 0 the federated model is better. ``interval`` is None for fewer than two blocks.
    """

    outcome: Outcome
    sentence: str
    difference: float
    interval: tuple[float, float] | None
    p_value: float


def part_intervals(
    losses: Blocks,
    right: Blocks,
    counted: Blocks,
    generator: np.random.Generator,
    target: Target = "tokens",
) -> dict[str, list[float]]:
    """95 % intervals of the headline metric and ``accuracy`` over blocks, as ``KEY_interval``.

    Args:
        losses: float [blocks], summed over a block's tokens, nats.
        right: int [blocks], tokens that were predicted right.
        counted: int [blocks], tokens.
        generator: where the draws come from.
        target: what blocks are made of.

    Returns:
        {} for fewer than two blocks: nothing can be redrawn.
    """
    if np.count_nonzero(counted) < 2:
        return {}
    sums = _redrawn(np.stack([losses, right, counted]), generator)
    loss, accuracy = (_ends(sums[at] / sums[2]) for at in (0, 1))
    shown = [_WORDS[target].value(end) for end in loss]
    return {f"{METRICS[target][0].key}_interval": shown, "accuracy_interval": list(accuracy)}


def block_verdict(
    federated: Blocks,
    other: Blocks,
    counted: Blocks,
    *,
    name: str,
    generator: np.random.Generator,
    rival: Rival = "local_only",
    target: Target = "tokens",
) -> BlockVerdict:
    """Compare the losses of two models on the same blocks of the site ``name``.

    Args:
        federated: float [blocks], the federated model's loss summed over a block, nats.
        other: float [blocks], that of the other model on the same blocks.
        counted: int [blocks], tokens of a block.
        name: the site as the sentence calls it; not escaped.
        generator: where the draws come from.
        rival: what the other model is: the site's own, or the backbone untouched.
        target: what blocks are made of.

    Raises:
        ValueError: the three are not vectors of one length.
    """
    if federated.ndim != 1 or not federated.shape == other.shape == counted.shape:
        raise ValueError(f"three vectors of one length, not {federated.shape} and {other.shape}")
    kept = counted > 0
    federated, other, counted = federated[kept], other[kept], counted[kept]
    words, parts = _WORDS[target], int(counted.sum())
    if not parts:
        sentence = f"Whether federating helped {name} is not known: it has no test {target}."
        return BlockVerdict("unknown", sentence, 0.0, None, 1.0)
    gaps = federated - other
    difference = float(gaps.sum() / parts)
    interval, p_value = None, 1.0
    if len(gaps) > 1:
        sums = _redrawn(np.stack([gaps, counted]), generator)
        interval = _ends(sums[0] / sums[1])
        p_value = _flipped(gaps, generator)
    outcome = _outcome(interval, p_value)
    shown = tuple(
        METRICS[target][0].text(words.value(float(losses.sum()) / parts))
        for losses in (federated, other)
    )
    span = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    gap = f"{words.difference.format(difference)}{span}"
    blocks = words.one if len(gaps) == 1 else f"{len(gaps):,} {words.many}"
    measured = (METRICS[target][0].name, *shown)
    sentence = _sentence(outcome, name, rival, measured, f"{gap}, {blocks}", p_value)
    return BlockVerdict(outcome, sentence, difference, interval, p_value)


def _redrawn(sums: Blocks, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sums [k, DRAWS] over redrawn columns of ``sums`` [k, blocks]."""
    blocks = sums.shape[1]
    shares = np.full(blocks, 1 / blocks)
    most = max(1, AT_ONCE // blocks)
    parts = [
        sums @ generator.multinomial(blocks, shares, min(most, DRAWS - at)).T
        for at in range(0, DRAWS, most)
    ]
    return np.concatenate(parts, axis=1)


def _ends(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _flipped(gaps: Blocks, generator: np.random.Generator) -> float:
    """Two-sided p-value: how often chance alone would put the models as far apart.

    The observed order is counted as one of the draws, so that it is never 0 (Phipson and Smyth
    2010, "Permutation P-values Should Never Be Zero").
    """
    least = abs(gaps.sum()) * (1 - 1e-9)  # sums of the same numbers differ in the last bits
    most, found = max(1, AT_ONCE // len(gaps)), 0
    for at in range(0, DRAWS, most):
        signs = generator.choice((-1.0, 1.0), (min(most, DRAWS - at), len(gaps)))
        found += int(np.count_nonzero(np.abs(signs @ gaps) >= least))
    return (found + 1) / (DRAWS + 1)


def _outcome(interval: tuple[float, float] | None, p_value: float) -> Outcome:
    """Test and interval must agree, as where labels are predicted; less loss is better."""
    if interval is None or p_value >= LEVEL:
        return "unclear"
    if interval[1] < 0:
        return "helped"
    return "hurt" if interval[0] > 0 else "unclear"


def _sentence(
    outcome: Outcome,
    name: str,
    rival: Rival,
    measured: tuple[str, ...],
    facts: str,
    p_value: float,
) -> str:
    metric, ours, theirs = measured
    alone = rival == "local_only"
    if outcome not in ("helped", "hurt"):
        beside = "on its own" if alone else "for the backbone untouched"
        return (
            f"Unclear for {name}: {metric} {ours} federated, {theirs} {beside}, and that cannot "
            f"tell which is better ({facts}, p = {p_value:.2f})."
        )
    if alone:
        said = f"Federating {outcome} {name}: {metric} {ours} instead of {theirs} on its own"
        return f"{said} ({facts})."
    better, moral = ("better", "") if outcome == "helped" else ("worse", NEGATIVE)
    return (
        f"At {name} the federated model is {better} than the backbone untouched: {metric} {ours} "
        f"instead of {theirs} ({facts}).{moral}"
    )
