"""Learning rates by depth: lower blocks have smaller rates, and start to train later.

The two are discriminative fine-tuning and gradual unfreezing: Howard and Ruder 2018, "Universal
Language Model Fine-tuning for Text Classification" (sections 3.2 and 3.3). Lower blocks have more
general features, and the first gradients of a new head would spoil them.
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
    """The factor of the learning rate for each value of a vector.

    ``depth`` has the depth of each tensor (``depths``), ``sizes`` its number of values. The rate is
    multiplied by ``decay`` with each block downwards. The lowest block starts to train when the
    share ``unfreeze`` of all training is over; the others start before it, at equal distances.
    """

    def __init__(
        self, depth: Sequence[int], sizes: Sequence[int], *, decay: float, unfreeze: float
    ) -> None:
        self.sizes = torch.tensor(sizes)
        self.rates = torch.tensor([decay**one for one in depth])
        deepest = max(depth) or 1
        self.opens = torch.tensor([unfreeze * one / deepest for one in depth])

    def at(self, progress: Sequence[float]) -> torch.Tensor:
        """Return the factors, float32 [sites, values], at each site's ``progress``, 0 to 1."""
        opened = torch.tensor(progress)[:, None] >= self.opens
        return (self.rates * opened).float().repeat_interleave(self.sizes, dim=1)


def open_pace(stack: Stack, trained: Layout, settings: Training) -> Pace | None:
    """Return the pace of the tensors in ``trained``; None if all of them have the same rate."""
    if settings.layer_decay == 1 and not settings.unfreeze:
        return None
    sizes = [prod(shape) for shape in trained.shapes]
    depth = depths(
        stack.bench.model.get_base_model(), [n.removeprefix(OUTER) for n in trained.names]
    )
    return Pace(depth, sizes, decay=settings.layer_decay, unfreeze=settings.unfreeze)
