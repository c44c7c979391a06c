"""Rates that differ by depth: slower below (discriminative), and later (gradual unfreezing).

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification" (sections 3.2
and 3.3). What is below has more general features, and a new head's first gradients would spoil
them.
"""

from collections.abc import Sequence
from math import prod

import torch

from fedgraft.client.model.batched_model import Stack
from fedgraft.common.backbones.blocks import depths
from fedgraft.common.config.training import Training
from fedgraft.common.layout import OUTER, Layout

__all__ = ["Pace", "open_pace"]


class Pace:
    """How fast each value of a vector moves beside the learning rate.

    ``depth`` is that of each tensor (``depths``), ``sizes`` how many values it has. The rate falls
    by ``decay`` with each block; the lowest one starts to move at ``unfreeze`` of all training, the
    others before it in equal distances.
    """

    def __init__(
        self, depth: Sequence[int], sizes: Sequence[int], *, decay: float, unfreeze: float
    ) -> None:
        self.sizes = torch.tensor(sizes)
        self.rates = torch.tensor([decay**one for one in depth])
        deepest = max(depth) or 1
        self.opens = torch.tensor([unfreeze * one / deepest for one in depth])

    def at(self, progress: Sequence[float]) -> torch.Tensor:
        """Factors of the rate, float32 [sites, values]; ``progress`` is each site's, 0 to 1."""
        opened = torch.tensor(progress)[:, None] >= self.opens
        return (self.rates * opened).float().repeat_interleave(self.sizes, dim=1)


def open_pace(stack: Stack, trained: Layout, settings: Training) -> Pace | None:
    """The pace of what ``trained`` names; None where all of it moves alike."""
    if settings.layer_decay == 1 and not settings.unfreeze:
        return None
    sizes = [prod(shape) for shape in trained.shapes]
    depth = depths(
        stack.bench.model.get_base_model(), [n.removeprefix(OUTER) for n in trained.names]
    )
    return Pace(depth, sizes, decay=settings.layer_decay, unfreeze=settings.unfreeze)
