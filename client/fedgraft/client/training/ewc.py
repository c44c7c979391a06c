"""Elastic weight consolidation at a site: measure Fisher information, hold values to an anchor.

The measurement says which values the loss on the site's data depends on. The pull holds each value
to its anchor as strongly as the old data's loss depends on it (``common.adapters.fisher``).
"""

import numpy as np
import torch

from fedgraft.client.data.batches import Passes, by_length
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import Feed, VaryFeed, predict
from fedgraft.common.adapters.fisher import ANCHOR, NEW, OLD
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.training import Consolidation as Settings
from fedgraft.common.examples import Indices
from fedgraft.common.layout import Layout, Vector

__all__ = ["Consolidation", "fisher_information"]

AT_ONCE = 64  # examples whose gradients are computed in one pass
VALUES = 1 << 24  # of adapters, in the copies of one pass


class Consolidation:
    """The consolidation of one pass, whose sites start from ``flat``, [sites, trained.size]."""

    def __init__(self, settings: Settings, trained: Layout, flat: torch.Tensor) -> None:
        self.settings, self.trained = settings, trained
        start = trained.slices[NEW].start
        # The exchanged tensors stand first in the layout. Only local heads may stand between them
        # and the tensors that travel beside the adapter.
        self.carried = slice(0, trained.slices[NEW].stop - start)
        self.start = flat[:, start:].clone()
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        if settings.weight:
            old, anchor = (flat[:, trained.slices[name]].clone() for name in (OLD, ANCHOR))
            self.held = old, anchor

    def pull(self, gradient: torch.Tensor, flat: torch.Tensor) -> None:
        """Add weight x F x (value - anchor) to the gradients [active, values]."""
        if self.held is None:
            return
        old, anchor = (part[: len(flat)] for part in self.held)
        away = flat[:, self.carried] - anchor
        gradient[:, self.carried].add_(old * away, alpha=self.settings.weight)

    def write(self, number: int, vector: Vector, measured: Vector) -> None:
        """Put what a site ``measured`` into its ``vector``; old information and anchor stay."""
        vector[self.trained.slices[NEW].start :] = self.start[number].cpu().numpy()
        vector[self.trained.slices[NEW]] = measured[self.carried].clip(max=1.0) * np.float32(SCALE)


def fisher_information(
    stack: Stack, trained: Layout, feed: Feed, vector: Vector, vary: VaryFeed | None = None
) -> Vector:
    """Return the diagonal of the empirical Fisher information, float32 [trained.size].

    It is the sum over the examples of ``feed`` of the squared gradient of a single example's summed
    loss, divided by the number of targets: the loss is a mean over targets. Under the model the
    gradients of an example's tokens are uncorrelated, so the square of their sum stands for the sum
    of their squares. It is taken at ``vector`` (float32 [trained.size]) without any randomness of
    training. The stack computes it for many examples in one pass: each has a copy of the adapter of
    its own. If memory does not suffice for a pass, it is halved. ``vary`` is for tasks that hide
    parts of an example.

    Raises:
        SiteFailure: ``out-of-memory``: memory does not suffice for one example.
    """
    one = torch.from_numpy(vector).to(stack.device)
    summed = torch.zeros(trained.size, dtype=torch.float64, device=stack.device)

    def squares(index: Indices) -> torch.Tensor:
        views = stack.put(trained, one.expand(len(index), -1).clone())
        for view in views:
            view.requires_grad_(True)
        predicted, targets = predict([feed], [index], feed.width(index), vary)
        total = stack.objective.losses(predicted, targets).summed.sum()
        gradients = torch.autograd.grad(total, views, allow_unused=True)
        parts = [
            torch.zeros(view[0].numel(), device=stack.device)
            if gradient is None
            else gradient.reshape(len(index), -1).square().sum(0)
            for view, gradient in zip(views, gradients, strict=True)
        ]
        return torch.cat(parts)

    size = max(1, min(AT_ONCE, VALUES // trained.size))
    passes = Passes(size)
    for batch in by_length(feed.examples, size):
        for _, found in passes.over(batch, squares):
            summed += found
    mean: Vector = (summed / max(feed.examples.target_count, 1)).float().cpu().numpy()
    return mean
