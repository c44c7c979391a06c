"""What is minimised, and what is counted: one loss an example, whatever it is that is predicted.

The targets say which: one label an example, or one token a position.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch.nn import functional

__all__ = ["IGNORED", "Counts", "losses"]

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
    """Of a batch: the summed ``loss`` (nats), true and predicted classes, int64 [predictions].

    Tokens are of two classes: 0 is a token as it should be, so that ``true`` is all zeros and
    ``predicted`` is 1 where another token was likelier.
    """

    loss: float
    true: torch.Tensor
    predicted: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Self:
        """Count a batch; shapes as for ``losses``."""
        likeliest = logits.argmax(-1)
        if targets.dim() == 1:
            loss = functional.cross_entropy(logits, targets, reduction="sum")
            return cls(float(loss), targets.cpu(), likeliest.cpu())
        summed, _ = _by_sequence(logits, targets)
        wrong = (likeliest != targets)[targets != IGNORED].long().cpu()
        return cls(float(summed.sum()), torch.zeros_like(wrong), wrong)


def _by_sequence(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each sequence the summed loss and how many targets it has, both [b]."""
    loss = functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return loss.sum(1), (targets != IGNORED).sum(1)
