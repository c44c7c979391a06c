"""Random numbers in a pass over several sites: each site's come from its own generator."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgraft.common.examples import Indices

__all__ = ["Randomness", "SiteDropout", "SiteRows"]


@dataclass(frozen=True)
class SiteRows:
    """What one site has in the batch under way: ``count`` of R rows, ``width`` of the tokens.

    ``width`` is 0 where rows are not sequences; ``left`` says that padding stands before them. The
    numbers come from the site's own generator: these are the ``common.encoding.Draws`` of a task.
    """

    count: int
    width: int
    left: bool
    generator: torch.Generator

    def permutation(self, n: int) -> Indices:
        """The numbers 0 to n - 1 in random order, int64 [n]."""
        return torch.randperm(n, generator=self.generator).numpy()

    def uniform(self, n: int) -> NDArray[np.float32]:
        """Numbers in [0, 1), float32 [n]."""
        return torch.rand(n, generator=self.generator).numpy()

    def integers(self, high: int, n: int) -> Indices:
        """Whole numbers in [0, high), int64 [n]."""
        return torch.randint(high, (n,), generator=self.generator).numpy()


@dataclass
class Randomness:
    """What is random in the pass under way: nothing while ``rows`` is empty, as in evaluation.

    ``width`` is the batch's number of tokens, ``head`` the head's dropout probability.
    """

    sites: int = 1
    rows: tuple[SiteRows, ...] = ()
    width: int = 0
    head: float = 0.0

    def drop(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        """Dropout of ``x``, [K x R, ...], each site's part drawn from its own generator.

        Only its real rows and tokens are drawn for, so that a site draws the same numbers
        whoever is in the pass with it.
        """
        if not probability or not self.rows:
            return x
        keep = torch.ones(x.shape, dtype=torch.bool)
        for part, mine in zip(keep.chunk(self.sites), self.rows, strict=True):
            own = part[: mine.count]
            if self.width and x.ndim > 2 and x.shape[1] == self.width:
                start = self.width - mine.width if mine.left else 0
                own = own[:, start : start + mine.width]
            own.copy_(torch.rand(own.shape, generator=mine.generator) >= probability)
        return x * keep.to(x.device) / (1 - probability)


class SiteDropout(nn.Module):
    """Dropout with the generators of ``randomness``; without a probability it is the head's."""

    def __init__(self, randomness: Randomness, probability: float | None) -> None:
        super().__init__()
        self.randomness, self.p = randomness, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero each element with the probability and scale the rest up, in training only."""
        return self.randomness.drop(x, self.randomness.head if self.p is None else self.p)
