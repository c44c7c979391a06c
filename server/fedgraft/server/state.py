"""The state of a federation after a round, and the record of a round: plain values.

``better_score`` is the one rule by which early stopping chooses a round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.config.sections import EarlyStopping
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
    "better_score",
    "kept_validation",
]

Moments = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class State:
    """All values that the next round depends on; a checkpoint holds exactly these.

    ``adapter`` is float32 [exchanged.size]. ``best`` is the adapter with the best federated
    validation (None before the first one), and ``stale`` is the number of evaluations since then.
    """

    round: int
    adapter: NDArray[np.float32]
    moments: Moments = field(default_factory=dict)
    best: NDArray[np.float32] | None = None
    best_score: float | None = None
    stale: int = 0

    @property
    def final(self) -> NDArray[np.float32]:
        """The adapter to keep: with early stopping the best one, otherwise the last one."""
        return self.adapter if self.best is None else self.best


@dataclass(frozen=True)
class Dropped:
    """A site that was dropped from a round, and the reason code."""

    site: str
    reason: str


@dataclass
class Traffic:
    """Bytes of the payloads that a stage sent and received, and the sites that it dropped."""

    bytes_up: int = 0
    bytes_down: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    def count(self, *, up: int, down: int) -> None:
        """Add the bytes that a site sent (``up``) and the bytes that were sent to it (``down``)."""
        self.bytes_up += up
        self.bytes_down += down

    def drop(self, site: str, reason: str) -> None:
        """Record that ``site`` does not count, and the reason code."""
        self.dropped.append(Dropped(site, reason))


@dataclass(frozen=True)
class Gathered:
    """The result of training at a cohort: the combined update, float64 [exchanged.size].

    The update combines ``count`` sites. ``examples`` (None if they are not counted) and ``loss``,
    the mean training loss, are over all these sites. ``masked`` says how the sum was protected.
    """

    update: NDArray[np.float64]
    count: int
    examples: int | None
    loss: float
    traffic: Traffic
    masked: dict[str, Any] | None = None


@dataclass(frozen=True)
class Partial:
    """An unfinished round: the replies that have come so far, added up.

    ``answered`` are sites that need not be asked again. ``tensors`` are the arrays of the rule's
    collector.
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
    """The result of federated validation; its tally is empty if it was not due or failed."""

    tally: Tally
    traffic: Traffic


@dataclass(frozen=True)
class RoundRecord:
    """The record of one round.

    ``asked`` sites were in the cohort, and ``sites`` of them gave an update that counted.
    ``bytes_*`` are sums over the cohort, ``seconds`` is wall time. ``masked`` says how secure
    aggregation protected the round (None without it). ``examples`` is None if they are not counted.
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
        """Return the record as plain JSON values."""
        return asdict(self)


def better_score(
    stopping: EarlyStopping, found: Mapping[str, Any], best: float | None
) -> float | None:
    """Return the score of the validation ``found`` if it is better than ``best``, otherwise None.

    A larger score is better. ``best`` is the best score of earlier rounds, or None.
    """
    score = stopping.score(found)
    return score if best is None or score > best + stopping.min_delta else None


def kept_validation(
    history: Sequence[Mapping[str, Any]], stopping: EarlyStopping | None
) -> dict[str, Any] | None:
    """Return the federated validation of the adapter that a run keeps, which is ``State.final``.

    That adapter is the last one, or with early stopping the best one. The result is None if this
    adapter was not validated. ``history`` has one ``RoundRecord`` as JSON for each round.
    """
    if stopping is None:
        return history[-1]["validation"] if history else None
    kept, best = None, None
    for found in (line["validation"] for line in history if line["validation"]):
        if (score := better_score(stopping, found, best)) is not None:
            kept, best = found, score
    return kept
