"""Elastic weight consolidation at a site: measure what its data needs, hold to what old did."""

from collections.abc import Sequence

import torch

from fedgraft.common.adapters.fisher import ANCHOR, NEW, OLD
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.training import Consolidation as Settings
from fedgraft.common.layout import Layout, Vector

__all__ = ["Consolidation"]


class Consolidation:
    """Of a pass whose sites start from ``flat``, float32 [sites, trained.size].

    ``epochs`` are the rows of each site's epoch. The diagonal of the empirical Fisher information
    is the mean of squared gradients of single examples. Where those of a batch of b are independent
    around zero, as near an optimum, it is b times the mean of squared batch gradients, of which
    there is one for each step anyhow.
    """

    def __init__(
        self, settings: Settings, trained: Layout, epochs: Sequence[int], flat: torch.Tensor
    ) -> None:
        self.settings, self.trained, self.epochs = settings, trained, epochs
        start = trained.slices[NEW].start
        # What travels stands first in the layout, before anything beside it, but for local heads.
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
        """Note the gradients [active, values] of the losses of batches of ``sizes``."""
        squares = gradient[:, self.carried] ** 2
        for number, size in enumerate(sizes):
            seen = self.rows[number]
            rate = size / max(min(seen + size, self.epochs[number]), size)
            self.squares[number].lerp_(squares[number] * size, rate)
            self.rows[number] = seen + size

    def pull(self, gradient: torch.Tensor, flat: torch.Tensor) -> None:
        """Add weight x F x (what it is - what it was) to the gradients [active, values]."""
        if self.held is None:
            return
        old, anchor = (part[: len(flat)] for part in self.held)
        away = flat[:, self.carried] - anchor
        gradient[:, self.carried].add_(old * away, alpha=self.settings.weight)

    def write(self, number: int, vector: Vector) -> None:
        """Put a site's measurement into its ``vector``; what was handed out stays as it came."""
        vector[self.trained.slices[NEW].start :] = self.start[number].cpu().numpy()
        measured = self.squares[number].clamp(max=1.0) * SCALE
        vector[self.trained.slices[NEW]] = measured.cpu().numpy()
