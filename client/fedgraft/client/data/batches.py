"""Batches of examples of similar length, which have little padding, and their tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from fedgraft.common.examples import Examples, Indices
from fedgraft.common.examples import Inputs as Arrays

__all__ = ["Inputs", "as_tensors", "by_length", "in_order"]

Inputs = dict[str, torch.Tensor]
"""A batch as a model reads it."""


def as_tensors(arrays: Arrays) -> Inputs:
    """Return a batch as PyTorch tensors on the same memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def by_length(examples: Examples, size: int) -> list[Indices]:
    """Return the indices of batches of at most ``size`` examples, the shortest examples first."""
    order: Indices = np.argsort(np.asarray(examples.lengths), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_order(batches: Sequence[Indices], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of ``parts``, one for each of ``batches``, in the order of the examples."""
    return torch.cat(list(parts))[torch.from_numpy(np.argsort(np.concatenate(batches)))]
