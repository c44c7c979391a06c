"""What an encoder gets from its caller: settings, rows, a place to keep arrays, random numbers."""

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
    """The name of a file in a store, made of ``parts``."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Settings:
    """What of a job decides how rows become examples and what is measured on them.

    ``masked`` is the share of tokens or patches that is hidden, None where the job does not say;
    ``seconds`` are of a recording, ``max_length`` is in tokens. ``score_bins``, ``groups`` and
    ``min_group`` say what is counted beside (``metrics.measures``). ``keys`` are those of
    ``[data]`` that only the job's task has, its defaults filled in.
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
    keys: Mapping[str, Any] = field(default_factory=dict)


class Rows(Protocol):
    """A site's rows as they were read and checked: columns of Python values."""

    def __len__(self) -> int:
        """The number of rows."""

    def column(self, name: str) -> list[Any]:
        """All values of a column."""

    def batches(self, name: str, size: int) -> Iterator[list[Any]]:
        """The values of a column, ``size`` rows at a time: not all files are held at once."""

    def digest(self, name: str) -> str:
        """SHA-256 (hex) over the texts or the bytes of the files of a column, in order."""


class Keep(Protocol):
    """Where an encoder keeps what it makes; the caller decides whether and for how long.

    The names that encoders give hold everything that decides the content but the backbone, which
    the caller adds.
    """

    def tokens(self, name: NameParts, make: Callable[[], Arrays]) -> Arrays:
        """Named arrays: those that were kept under ``name``, or what ``make`` gives."""

    def array(
        self,
        shape: tuple[int, ...],
        fill: Callable[[NDArray[Any]], None],
        name: Callable[[], NameParts],
    ) -> NDArray[np.float32]:
        """One float32 array that ``fill`` makes, in memory or mapped from a file.

        ``name`` is asked for only where it goes into a file.
        """


class Draws(Protocol):
    """Random numbers of one site for a batch, whose first ``count`` rows are the site's own."""

    @property
    def count(self) -> int:
        """Rows of the batch that are real."""

    def permutation(self, n: int) -> Indices:
        """The numbers 0 to n - 1 in random order, int64 [n]."""

    def uniform(self, n: int) -> NDArray[np.float32]:
        """Numbers in [0, 1), float32 [n]."""

    def integers(self, high: int, n: int) -> Indices:
        """Whole numbers in [0, high), int64 [n]."""
