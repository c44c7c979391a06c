"""What a federation is at the end of a round, and what happened in it: plain, frozen values."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dropped", "Moments", "RoundRecord", "State"]

Moments = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class State:
    """All that the next round depends on; a checkpoint is exactly this.

    ``adapter`` float32 [exchanged.size]; ``best`` the adapter with the best federated validation
    (None before the first); ``stale`` evaluations since then.
    """

    round: int
    adapter: NDArray[np.float32]
    moments: Moments = field(default_factory=dict)
    best: NDArray[np.float32] | None = None
    best_score: float | None = None
    stale: int = 0

    @property
    def final(self) -> NDArray[np.float32]:
        """The adapter to keep: the best one where early stopping chose it, else the last."""
        return self.adapter if self.best is None else self.best


@dataclass(frozen=True)
class Dropped:
    """A site whose part of a round did not count, and the reason code."""

    site: str
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round.

    ``asked`` sites were in the cohort, ``sites`` gave an update that counted; ``bytes_*`` are sums
    over the cohort, ``seconds`` wall time.
    """

    round: int
    asked: int
    sites: int
    dropped: tuple[Dropped, ...]
    examples: int
    train_loss: float
    update_norm: float
    validation: dict[str, float] | None
    bytes_up: int
    bytes_down: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)
