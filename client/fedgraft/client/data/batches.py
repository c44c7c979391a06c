"""Batches of examples of similar length, which have little padding, and their tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import Examples, Indices
from fedgraft.common.examples import Inputs as Arrays

__all__ = ["Inputs", "Passes", "as_tensors", "by_length", "in_order", "is_out_of_memory"]

T = TypeVar("T")


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


class Passes:
    """Passes over examples, at most ``size`` at a time; where memory is short, ever fewer.

    ``fewest`` examples are always tried at once.
    """

    def __init__(self, size: int, *, fewest: int = 1) -> None:
        self.size, self.fewest = size, fewest

    def over(self, index: Indices, work: Callable[[Indices], T]) -> Iterator[tuple[Indices, T]]:
        """Yield each part of ``index``, in order, with what ``work`` returns for it.

        If memory does not suffice for a part, it is halved, and so are all later ones.

        Raises:
            SiteFailure: ``out-of-memory``: memory does not suffice for ``fewest`` examples.
        """
        done = 0
        while done < len(index):
            part = index[done : done + self.size]
            try:
                result = work(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                yield part, result
                done += len(part)
                continue
            # Here the error, which holds tensors, is gone.
            self.size = max(len(part) // 2, self.fewest)
            if self.size >= len(part):
                raise SiteFailure("out-of-memory")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # cached blocks have the old, useless size


def is_out_of_memory(error: Exception) -> bool:
    """Return whether ``error`` says that a device, or this machine, has no memory left."""
    # PyTorch has no class of its own for an allocation on the CPU that fails.
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)
