"""The interface of an aggregation rule, and the running sum for every rule that needs only sums."""

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
"""The error text and the hint that refuse statistics beside an adapter (domain, consolidation)."""


class Rule(Protocol):
    """An aggregation rule: it combines the updates of one round into one step of the adapter.

    ``needs`` is ``"sum"`` if the weighted sum of the updates is enough: such a rule works with
    masked sums. ``needs`` is ``"individual"`` if the rule must see the update of each site.
    ``refuses`` lists the settings that do not work with the rule, by the names in
    ``config/compatibility.py``.
    """

    @property
    def needs(self) -> Literal["sum", "individual"]:
        """Return ``"sum"`` or ``"individual"``: the input that the rule needs."""
        ...

    @property
    def refuses(self) -> Refuses:
        """Return the settings that do not work with the rule."""
        ...

    @property
    def keeps_own(self) -> bool:
        """Return whether each site keeps some tensors that it does not send."""
        ...

    def keeps(self, name: str) -> bool:
        """Return whether the adapter tensor ``name`` is trained at each site and stays there."""
        ...

    def card_note(self, *, own_parts: bool, shared_head: bool) -> str:
        """Return the model card's text about the tensors that stay at sites; empty if none stay.

        ``own_parts``: the folder contains such tensors of one site. ``shared_head``: sites send the
        head.
        """
        ...

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Return the names of the tensors in ``layout`` that sites train and send."""
        ...

    def collect(self, size: int) -> "Collector":
        """Return a collector for the updates of one round; each update is float32 [size]."""
        ...

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the step of the global adapter from the output of ``collect``; both are [d].

        For a rule that needs only sums, ``combined`` is the weighted mean. The rule does not need
        to know which code computed that mean.
        """
        ...


class Collector(Protocol):
    """An object that takes updates one by one and combines them."""

    @property
    def count(self) -> int:
        """Return the number of updates so far."""
        ...

    def add(self, update: Vector, weight: float) -> None:
        """Add ``update``, float32 [size], with a positive ``weight``."""
        ...

    def combined(self) -> NDArray[np.float64]:
        """Return the combination of all updates, float64 [size].

        Raises:
            ZeroDivisionError: there is no update.
        """
        ...

    def kept(self) -> Tensors:
        """Return the full state, so that a round can continue after a crash."""
        ...

    def restore(self, kept: Tensors) -> None:
        """Replace the empty state by ``kept``, a state that the method ``kept`` returned."""
        ...


class RunningMean:
    """The weighted mean of updates that arrive one by one; it stores one float64 vector only."""

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
        """Return the sum [size], and the weight and the count; all float64."""
        return {"sum": self._sum, "facts": np.array([self.weight, self.count], np.float64)}

    def restore(self, kept: Tensors) -> None:
        """Continue from ``kept``, a state that the method ``kept`` returned."""
        self._sum, (self.weight, count) = kept["sum"].copy(), kept["facts"].tolist()
        self.count = int(count)

    def combined(self) -> NDArray[np.float64]:
        """Return the weighted mean so far, float64 [size].

        Raises:
            ZeroDivisionError: no update was added.
        """
        if not self.count:
            raise ZeroDivisionError("the mean of no updates")
        return self._sum / self.weight


class WholeAdapter:
    """A base class for rules under which sites train and send every tensor."""

    refuses: ClassVar[Refuses] = {}
    keeps_own: ClassVar[bool] = False

    def keeps(self, name: str) -> bool:
        """Return False: no tensor stays at a site."""
        return False

    def card_note(self, *, own_parts: bool, shared_head: bool) -> str:
        """Return an empty text: no tensor stays at a site."""
        return ""

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Return the name of every tensor of the adapter."""
        return layout.names


@dataclass(frozen=True)
class MeanRule(WholeAdapter):
    """The common part of all rules whose step is the weighted mean of the sent tensors."""

    needs: Literal["sum", "individual"] = "sum"

    def collect(self, size: int) -> RunningMean:
        """Return a running weighted mean."""
        return RunningMean(size)

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean itself."""
        return combined
