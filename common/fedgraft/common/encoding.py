"""The inputs of an encoder: settings, rows, a store for arrays, and random numbers."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.examples import Indices

__all__ = ["Arrays", "Draws", "Keep", "NameParts", "Rows", "Settings", "digest_of"]

Arrays = dict[str, NDArray[Any]]
NameParts = tuple[str | int, ...]


def digest_of(*parts: str | int) -> str:
    """Return the name of a file in a store, made from ``parts``."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Settings:
    """The settings of a job that decide the conversion of rows to examples, and the measures.

    ``masked`` is the share of hidden tokens or patches; it is None if the job does not set it.
    ``seconds`` is the length of a recording, and ``max_length`` is in tokens. ``score_bins``,
    ``groups``, ``min_group`` and ``heads`` decide the additional counts (``metrics.measures``).
    ``keys`` are the keys of ``[data]`` that only the job's task has, with defaults filled in.
    """

    labels: tuple[str, ...] = ()
    seed: int = 0
    max_length: int = 128
    masked: float | None = None
    seconds: float = 5.0
    normalize: Literal["backbone", "per-image"] = "backbone"
    score_bins: int = 0
    groups: tuple[str, ...] = ()
    min_group: int = 1
    heads: tuple[int, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)


class Rows(Protocol):
    """A site's rows after reading and checking: columns of Python values."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def column(self, name: str) -> list[Any]:
        """Return all values of a column."""

    def batches(self, name: str, size: int) -> Iterator[list[Any]]:
        """Yield the values of a column, ``size`` rows at a time.

        So not all files are in memory at once.
        """

    def digest(self, name: str) -> str:
        """Return the SHA-256 (hex) over a column in order: over texts, or the bytes of files."""


class Keep(Protocol):
    """The store of an encoder's arrays; the caller decides whether and how long arrays are kept.

    The names from encoders contain everything that decides the content, except the backbone; the
    caller adds the backbone.
    """

    def tokens(self, name: NameParts, make: Callable[[], Arrays]) -> Arrays:
        """Return the named arrays kept under ``name``, or the output of ``make``."""

    def array(
        self,
        shape: tuple[int, ...],
        fill: Callable[[NDArray[Any]], None],
        name: Callable[[], NameParts],
    ) -> NDArray[np.float32]:
        """Return one float32 array that ``fill`` fills, in memory or mapped from a file.

        ``name`` is called only if the array goes into a file.
        """


class Draws(Protocol):
    """Random numbers of one site for a batch; the first ``count`` rows are the site's own."""

    @property
    def count(self) -> int:
        """Return the number of real rows in the batch."""

    def permutation(self, n: int) -> Indices:
        """Return the numbers 0 to n - 1 in random order, int64 [n]."""

    def uniform(self, n: int) -> NDArray[np.float32]:
        """Return numbers in [0, 1), float32 [n]."""

    def integers(self, high: int, n: int) -> Indices:
        """Return whole numbers in [0, high), int64 [n]."""
