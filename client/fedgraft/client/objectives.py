"""What is minimised, and what is counted: one loss an example, whatever it is that is predicted.

The targets say which: one label an example, or one token a position.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch.nn import functional

__all__ = ["IGNORED", "BlockCounts", "Counts", "losses"]

IGNORED = -100  # a target that is none: padding, or a position after which nothing comes


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, float32 [b]; of a sequence the mean over its targets.

    ``logits`` [b, classes] with ``targets`` [b], or [b, width, vocabulary] with [b, width], where
    ``IGNORED`` marks positions that do not count.
    """
    if targets.dim() == 1:
        return functional.cross_entropy(logits, targets, reduction="none")
    summed, counted = _by_sequence(logits, targets)
    return summed / counted.clamp(min=1)


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
    """Of each sequence, [b]: the summed loss (nats), tokens that were likeliest, and all tokens."""

    losses: torch.Tensor
    right: torch.Tensor
    counted: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Self:
        """Count ``logits`` [b, width, vocabulary] with ``targets`` [b, width]."""
        summed, counted = _by_sequence(logits, targets)
        right = ((logits.argmax(-1) == targets) & (targets != IGNORED)).sum(1)
        return cls(summed, right, counted)


def _by_sequence(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each sequence the summed loss and how many targets it has, both [b]."""
    loss = functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return loss.sum(1), (targets != IGNORED).sum(1)
