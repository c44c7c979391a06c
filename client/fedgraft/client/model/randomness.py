"""Random numbers in a pass over several sites: each site draws from its own generator."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgraft.common.examples import Indices

__all__ = ["Randomness", "SiteDropout", "SiteRows"]


@dataclass(frozen=True)
class SiteRows:
    """One site's share of the current batch: ``count`` of the R rows, ``width`` of the tokens.

    ``width`` is 0 if rows are not sequences; ``left`` says that padding stands before the tokens.
    The numbers come from the site's own generator. A task uses them as ``common.encoding.Draws``.
    """

    count: int
    width: int
    left: bool
    generator: torch.Generator

    def permutation(self, n: int) -> Indices:
        """Return the numbers 0 to n - 1 in random order, int64 [n]."""
        return torch.randperm(n, generator=self.generator).numpy()

    def uniform(self, n: int) -> NDArray[np.float32]:
        """Return random numbers in [0, 1), float32 [n]."""
        return torch.rand(n, generator=self.generator).numpy()

    def integers(self, high: int, n: int) -> Indices:
        """Return random whole numbers in [0, high), int64 [n]."""
        return torch.randint(high, (n,), generator=self.generator).numpy()


@dataclass
class Randomness:
    """The randomness of the current pass; without ``rows``, as in evaluation, there is none.

    ``width`` is the batch's number of tokens, ``head`` the dropout probability of the head.
    """

    sites: int = 1
    rows: tuple[SiteRows, ...] = ()
    width: int = 0
    head: float = 0.0

    def drop(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        """Apply dropout to ``x``, [K x R, ...]; each site's part is drawn from its own generator.

        Numbers are drawn only for the site's real rows and tokens. So a site draws the same numbers
        whichever sites share its pass.
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
    """Dropout with the generators of ``randomness``; None means the head's probability."""

    def __init__(self, randomness: Randomness, probability: float | None) -> None:
        super().__init__()
        self.randomness, self.p = randomness, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero each element with the probability and scale the rest up, in training only."""
        return self.randomness.drop(x, self.randomness.head if self.p is None else self.p)
