"""What is minimised, and what is counted: one loss an example, whatever it is that is predicted.

The targets say which: one label an example, or one token a position.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch.nn import functional

__all__ = ["IGNORED", "BlockCounts", "Counts", "distances", "losses", "restrict"]

CLOSE = 0.1  # mean absolute error of a patch, of pixels as the model reads them
IGNORED = -100  # a target that is none: padding, or a position after which nothing comes


def losses(logits: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy in nats, float32 [b]; of a sequence the mean over its targets.

    ``logits`` [b, classes] with ``targets`` [b], or [b, width, vocabulary] with [b, width], where
    ``IGNORED`` marks positions that do not count; or values [b, patches, pixels] of both, where NaN
    does: then it is the mean absolute error. With ``smoothing`` that share of each target is
    spread over all classes that are possible (Szegedy et al. 2016, "Rethinking the Inception
    Architecture for Computer Vision", section 7).
    """
    if targets.dim() == 1:
        return _smoothed(
            functional.cross_entropy(logits, targets, reduction="none"),
            logits,
            targets != IGNORED,
            smoothing,
        )
    each, counts = _by_position(logits, targets, smoothing)
    return each.sum(1) / counts.sum(1).clamp(min=1)


def _smoothed(
    each: torch.Tensor, logits: torch.Tensor, counts: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """``each`` loss with a share of that against the uniform distribution over what is possible."""
    if not smoothing:
        return each
    possible = logits > -torch.inf
    spread = -torch.where(possible, logits.log_softmax(-1), 0.0).sum(-1) / possible.sum(-1)
    return (1 - smoothing) * each + smoothing * spread * counts


def distances(logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) at temperature T in nats, float32 [b]; both [b, classes].

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network": T^2 keeps its gradient of
    one size whatever T is.
    """
    wanted = (taught / temperature).softmax(-1)
    terms = (taught / temperature).log_softmax(-1) - (logits / temperature).log_softmax(-1)
    # What is impossible for both is no term: it would be 0 times infinity minus infinity.
    summed = (wanted * torch.where(wanted > 0, terms, 0.0)).sum(-1)
    return temperature**2 * summed


def restrict(logits: torch.Tensor, targets: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """``logits`` [b, classes] with minus infinity wherever a class is of another head.

    ``heads`` names each class's head; that of a row is its target's. None with one head for all,
    and a row without a target keeps all of its classes.
    """
    if not heads:
        return logits
    of = torch.tensor(heads, device=logits.device)
    mine = of[targets.clamp(min=0)][:, None] == of
    mine |= (targets == IGNORED)[:, None]
    return logits.masked_fill(~mine, -torch.inf)


@dataclass(frozen=True)
class Counts:
    """Of a batch: the summed ``loss`` (nats), true and predicted labels, int64 [b]."""

    loss: float
    true: torch.Tensor
    predicted: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Self:
        """Count ``logits`` [b, classes] with ``targets`` [b]."""
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        return cls(float(loss), targets.cpu(), logits.argmax(-1).cpu())


@dataclass(frozen=True)
class BlockCounts:
    """Of each sequence, [b]: the summed loss (nats), tokens that were likeliest, and all tokens.

    Or of an image: the summed error, hidden patches that are close, and all that are hidden.
    """

    losses: torch.Tensor
    right: torch.Tensor
    counted: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Self:
        """Count ``logits`` [b, width, vocabulary] with ``targets`` [b, width]."""
        each, counts = _by_position(logits, targets, 0.0)
        right = torch.zeros_like(counts)
        if targets.is_floating_point():
            right = counts & (each < CLOSE)
        else:
            right[counts] = logits[counts].argmax(-1) == targets[counts]
        return cls(each.sum(1), right.sum(1), counts.sum(1))


def _by_position(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss at each position, [b, width], zero at those without a target, and which have one.

    Only of those it is computed: a vocabulary is large, and of hidden tokens one in seven counts.
    """
    if targets.is_floating_point():
        counts = ~targets[..., 0].isnan()
        off = (logits[counts] - targets[counts]).abs().mean(-1)
        return off.new_zeros(counts.shape).masked_scatter(counts, off), counts
    counts = targets != IGNORED
    some, wanted = logits[counts], targets[counts]
    each = functional.cross_entropy(some, wanted, reduction="none")
    each = _smoothed(each, some, torch.ones_like(wanted, dtype=torch.bool), smoothing)
    return each.new_zeros(counts.shape).masked_scatter(counts, each), counts
