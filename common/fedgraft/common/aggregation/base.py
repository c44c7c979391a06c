"""The contract of a rule, and the running sum that every rule which needs only sums shares."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.layout import Layout, Vector
from fedgraft.common.section import Refuses

__all__ = [
    "PLAIN_MEAN",
    "Collector",
    "MeanRule",
    "Rule",
    "RunningMean",
    "Tensors",
    "WholeAdapter",
]

Tensors = dict[str, NDArray[Any]]

PLAIN_MEAN = (
    "training.{beside} needs the plain mean over sites, of their statistics too",
    'aggregation.rule = "fedavg" with server_optimizer.kind = "none"',
)
"""Why statistics that travel beside an adapter (domain, consolidation) are refused."""


class Rule(Protocol):
    """How the updates of one round become one.

    ``needs`` is ``"sum"`` if the weighted sum of the updates is enough, so that masked sums work,
    or ``"individual"`` if the rule must see each site's own. ``refuses`` says what does not go
    together with it, by the names of ``config/compatibility.py``.
    """

    @property
    def needs(self) -> Literal["sum", "individual"]:
        """What the rule must see."""
        ...

    @property
    def refuses(self) -> Refuses:
        """What does not go together with the rule."""
        ...

    @property
    def keeps_own(self) -> bool:
        """Whether each site keeps tensors to itself."""
        ...

    def keeps(self, name: str) -> bool:
        """Whether the adapter tensor ``name`` trains and stays at each site."""
        ...

    def card_note(self, *, own_parts: bool, shared_head: bool) -> str:
        """What the model card says of tensors that stay at sites; empty where none do.

        ``own_parts``: the folder has those of one site; ``shared_head``: the head travels.
        """
        ...

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Names of the tensors in ``layout`` that sites train and send."""
        ...

    def collect(self, size: int) -> "Collector":
        """Something that takes the updates of one round, float32 [size] each."""
        ...

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """The step of the global adapter, from what ``collect`` combined, both [d].

        For a rule that needs only sums that is the weighted mean, whoever computed it.
        """
        ...


class Collector(Protocol):
    """Takes updates one by one and combines them."""

    @property
    def count(self) -> int:
        """Updates so far."""
        ...

    def add(self, update: Vector, weight: float) -> None:
        """Take ``update``, float32 [size], with a positive ``weight``."""
        ...

    def combined(self) -> NDArray[np.float64]:
        """All of them combined, float64 [size]; ZeroDivisionError if there are none."""
        ...

    def kept(self) -> Tensors:
        """All that it holds, so that a round can go on after a crash."""
        ...

    def restore(self, kept: Tensors) -> None:
        """Hold what ``kept`` gave, instead of nothing."""
        ...


class RunningMean:
    """Weighted mean of updates that arrive one by one; one float64 vector, never the updates."""

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, np.float64)
        self.weight = 0.0
        self.count = 0

    def add(self, update: Vector, weight: float) -> None:
        """Add ``update``, float32 [size], with a positive ``weight``."""
        self._sum += np.multiply(update, weight, dtype=np.float64)
        self.weight += weight
        self.count += 1

    def kept(self) -> Tensors:
        """The sum [size], the weight and the count, float64."""
        return {"sum": self._sum, "facts": np.array([self.weight, self.count], np.float64)}

    def restore(self, kept: Tensors) -> None:
        """Go on from what ``kept`` gave."""
        self._sum, (self.weight, count) = kept["sum"].copy(), kept["facts"].tolist()
        self.count = int(count)

    def combined(self) -> NDArray[np.float64]:
        """The weighted mean so far, float64 [size].

        Raises:
            ZeroDivisionError: nothing was added.
        """
        if not self.count:
            raise ZeroDivisionError("the mean of no updates")
        return self._sum / self.weight


class WholeAdapter:
    """A base for rules under which every tensor trains and travels."""

    refuses: ClassVar[Refuses] = {}
    keeps_own: ClassVar[bool] = False

    def keeps(self, name: str) -> bool:
        """No tensor stays at a site."""
        return False

    def card_note(self, *, own_parts: bool, shared_head: bool) -> str:
        """Nothing."""
        return ""

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Every tensor of the adapter."""
        return layout.names


@dataclass(frozen=True)
class MeanRule(WholeAdapter):
    """What rules have in common whose step is the weighted mean of what travels."""

    needs: Literal["sum", "individual"] = "sum"

    def collect(self, size: int) -> RunningMean:
        """The weighted mean."""
        return RunningMean(size)

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean itself."""
        return combined
