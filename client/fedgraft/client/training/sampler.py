"""The order in which a site's examples are trained on."""

from collections.abc import Iterator

import numpy as np
import torch

from fedgraft.common.config.training import Training
from fedgraft.common.examples import Examples, Indices

__all__ = ["MEGABATCH", "shuffled"]

MEGABATCH = 16  # batches within which ``group_by_length`` sorts


def shuffled(
    examples: Examples, generator: torch.Generator, epochs: int, settings: Training
) -> Iterator[Indices]:
    """Yield shuffled batches, epoch after epoch.

    With ``group_by_length``, the rows of a batch have similar lengths.
    """
    size = settings.batch_size
    for _ in range(epochs):
        order = torch.randperm(len(examples), generator=generator)
        if settings.group_by_length:
            order = _grouped(order, examples, size, generator)
        for batch in torch.split(order, size):
            yield batch.numpy()


def _grouped(
    order: torch.Tensor, examples: Examples, size: int, generator: torch.Generator
) -> torch.Tensor:
    """Sort by length within stretches of a random ``order``, then shuffle whole batches.

    The partial batch, if any, stays last.
    """
    lengths = torch.from_numpy(np.asarray(examples.lengths))
    stretches = [
        stretch[torch.argsort(lengths[stretch], stable=True)]
        for stretch in torch.split(order, size * MEGABATCH)
    ]
    batches = list(torch.split(torch.cat(stretches), size))
    last = [batches.pop()] if len(batches[-1]) < size else []
    mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat([*mixed, *last])
