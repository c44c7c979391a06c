"""Elastic weight consolidation at a site: measure Fisher information, hold values to an anchor.

The measurement says which values the loss on the site's data depends on. The pull holds each value
to its anchor as strongly as the old data's loss depends on it (``common.adapters.fisher``).
"""

from collections.abc import Sequence

import torch

from fedgraft.common.adapters.fisher import ANCHOR, NEW, OLD
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.training import Consolidation as Settings
from fedgraft.common.layout import Layout, Vector

__all__ = ["Consolidation"]


class Consolidation:
    """The consolidation of one pass, whose sites start from ``flat``.

    ``flat`` is float32 [sites, trained.size]; ``epochs`` are the rows of each site's epoch. The
    diagonal of the empirical Fisher information is the mean of squared gradients of single
    examples. If the gradients in a batch of b examples are independent with mean zero, as near an
    optimum, this diagonal is b times the mean of squared batch gradients. Each step computes a
    batch gradient in any case.
    """

    def __init__(
        self, settings: Settings, trained: Layout, epochs: Sequence[int], flat: torch.Tensor
    ) -> None:
        self.settings, self.trained, self.epochs = settings, trained, epochs
        start = trained.slices[NEW].start
        # The exchanged tensors stand first in the layout. Only local heads may stand between them
        # and the tensors that travel beside the adapter.
        size = trained.slices[NEW].stop - start
        self.carried = slice(0, size)
        self.start = flat[:, start:].clone()
        self.squares = torch.zeros(len(flat), size, device=flat.device)
        self.rows = [0] * len(flat)
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        if settings.weight:
            old, anchor = (flat[:, trained.slices[name]].clone() for name in (OLD, ANCHOR))
            self.held = old, anchor

    def take(self, gradient: torch.Tensor, sizes: Sequence[int]) -> None:
        """Add the gradients [active, values] of batch losses; ``sizes`` are the batches' rows."""
        squares = gradient[:, self.carried] ** 2
        for number, size in enumerate(sizes):
            seen = self.rows[number]
            rate = size / max(min(seen + size, self.epochs[number]), size)
            self.squares[number].lerp_(squares[number] * size, rate)
            self.rows[number] = seen + size

    def pull(self, gradient: torch.Tensor, flat: torch.Tensor) -> None:
        """Add weight x F x (value - anchor) to the gradients [active, values]."""
        if self.held is None:
            return
        old, anchor = (part[: len(flat)] for part in self.held)
        away = flat[:, self.carried] - anchor
        gradient[:, self.carried].add_(old * away, alpha=self.settings.weight)

    def write(self, number: int, vector: Vector) -> None:
        """Put a site's measurement into its ``vector``; the old information and anchor stay."""
        vector[self.trained.slices[NEW].start :] = self.start[number].cpu().numpy()
        measured = self.squares[number].clamp(max=1.0) * SCALE
        vector[self.trained.slices[NEW]] = measured.cpu().numpy()
