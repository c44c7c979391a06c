"""What a federation is at the end of a round, and what happened in it: plain, frozen values."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.metrics.tally import Tally

__all__ = [
    "Dropped",
    "Evaluated",
    "Gathered",
    "Moments",
    "Partial",
    "RoundRecord",
    "State",
    "Traffic",
]

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


@dataclass
class Traffic:
    """Bytes of the payloads that a stage sent and received, and the sites it lost."""

    bytes_up: int = 0
    bytes_down: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    def count(self, *, up: int, down: int) -> None:
        """Add the bytes that came from a site (``up``) and those that were sent to it."""
        self.bytes_up += up
        self.bytes_down += down

    def drop(self, site: str, reason: str) -> None:
        """Note that ``site`` does not count, and why."""
        self.dropped.append(Dropped(site, reason))


@dataclass(frozen=True)
class Gathered:
    """What training at a cohort came to: the combined update, float64 [exchanged.size].

    ``count`` sites are in it; ``examples`` (None where nobody counts them) and ``loss``, the mean
    training loss, are over all of them. ``masked`` says how the sum was protected.
    """

    update: NDArray[np.float64]
    count: int
    examples: int | None
    loss: float
    traffic: Traffic
    masked: dict[str, Any] | None = None


@dataclass(frozen=True)
class Partial:
    """A round under way: the replies that came so far, as they were added up.

    ``answered`` sites need not be asked again; ``tensors`` are what the rule's collector holds.
    """

    round: int
    attempt: int
    answered: tuple[str, ...]
    examples: int
    loss: float
    traffic: Traffic
    tensors: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Evaluated:
    """What federated validation came to; an empty tally when it was not due or did not succeed."""

    tally: Tally
    traffic: Traffic


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round.

    ``asked`` sites were in the cohort, ``sites`` gave an update that counted; ``bytes_*`` are sums
    over the cohort, ``seconds`` wall time. ``masked`` says how secure aggregation protected the
    round (None without it); ``examples`` is None where nobody counts them.
    """

    round: int
    asked: int
    sites: int
    dropped: tuple[Dropped, ...]
    examples: int | None
    train_loss: float
    update_norm: float
    validation: dict[str, Any] | None
    bytes_up: int
    bytes_down: int
    seconds: float
    masked: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)
