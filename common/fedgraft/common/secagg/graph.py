"""The graph of parties that share secrets, and the numbers of parties that must answer.

With up to 128 parties, all parties are neighbours. With more, the neighbours of a party are the
``degree`` nearest parties on a circle; a hash of all advertised keys decides the order (Bell et al.
2020, section 3, with Harary graphs). Degree and threshold are the smallest numbers for which

- privacy: no honest party has ``threshold`` corrupt neighbours, and honest survivors are connected,
  except with probability 2^-40;
- correctness: every party has ``threshold`` survivors among itself and its neighbours, except
  with probability 2^-20.

The bounds are union bounds over exact hypergeometric tails, in integers, so that all parties agree
on every platform. They hold if the corrupt and the dropped parties are fixed before the circle is
drawn. If a coordinator chooses the dropouts *after* it saw the circle, it can at best split the sum
into sums over arcs. A coordinator that tries many sets of keys gains a factor per try. The complete
graph has neither weakness. The correctness bound also counts the share of an owner that dropped, so
it is too optimistic by a factor of up to 1.3.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import comb

from fedgraft.common.secagg.errors import ParameterError

__all__ = ["COMPLETE", "FEWEST", "Graph", "GraphPlan", "arrange", "plan_graph"]

COMPLETE = 128  # the most parties for which the graph is complete
PRIVACY, CORRECTNESS = 40, 20  # bits
FEWEST = 3


@dataclass(frozen=True)
class GraphPlan:
    """Degree and thresholds for ``parties``, of which ``colluders`` collude and ``dropouts`` drop.

    ``share_threshold`` shares open a secret. ``sign_threshold`` parties must sign the same set of
    survivors: all colluders and more than half of the honest parties. So no two sets can both be
    signed.
    """

    parties: int
    colluders: int
    dropouts: int
    degree: int
    share_threshold: int
    sign_threshold: int

    @property
    def fewest_survivors(self) -> int:
        """Return the least number of survivors for unmasking.

        These are all signers, and at least two honest parties.
        """
        return max(self.sign_threshold, self.colluders + 2)

    def among(self, advertised: int) -> "GraphPlan":
        """Return the plan for the ``advertised`` parties that are left after the first stage.

        All colluders may be among them. So a sparse graph is computed again, for the same rate of
        dropouts. The number of signatures stays that of all parties.

        Raises:
            ParameterError: fewer than ``sign_threshold`` parties are left, or more than before.
        """
        if not self.sign_threshold <= advertised <= self.parties:
            raise ParameterError("too few parties are left to sign")
        if self.degree == self.parties - 1:
            return replace(self, degree=advertised - 1)
        dropouts = -(-self.dropouts * advertised // self.parties)
        degree, threshold = _sparse(advertised, self.colluders, dropouts)
        return replace(self, degree=degree, share_threshold=threshold)


@lru_cache(maxsize=64)
def plan_graph(parties: int, colluders: int, dropouts: int) -> GraphPlan:
    """Return degree and thresholds for these numbers of parties, colluders (T) and dropouts.

    Raises:
        ParameterError: fewer than 3 parties, no assumed colluder, fewer than 2 honest parties, or
            more dropouts than the signature threshold allows.
    """
    if parties < FEWEST or colluders < 1 or colluders + 2 > parties:
        raise ParameterError("secure aggregation needs 3 parties, 2 of them honest, and T >= 1")
    sign_threshold = (parties + colluders) // 2 + 1
    if not 0 <= dropouts <= parties - sign_threshold:
        raise ParameterError(
            f"{parties} parties with {colluders} colluders stand {parties - sign_threshold} "
            f"dropouts, not {dropouts}"
        )
    degree, threshold = _sparse(parties, colluders, dropouts)
    return GraphPlan(parties, colluders, dropouts, degree, threshold, sign_threshold)


@lru_cache(maxsize=64)
def _sparse(parties: int, colluders: int, dropouts: int) -> tuple[int, int]:
    """Return degree and Shamir threshold; the graph is complete if no sparser graph is enough."""
    threshold = 1
    for degree in range(4, parties - 1, 2) if parties > COMPLETE else ():
        # A larger neighbourhood never needs a smaller threshold, so the search goes on from here.
        while not _rare(parties, parties - 1, colluders, degree, threshold, PRIVACY):
            threshold += 1
        missing = degree + 2 - threshold  # of the owner and its neighbours
        if _rare(parties, parties - 1, dropouts, degree, missing, CORRECTNESS) and _connected(
            parties, colluders + dropouts, degree // 2
        ):
            return degree, threshold
    return parties - 1, max(colluders + 1, parties // 2 + 1)


def _rare(times: int, population: int, marked: int, drawn: int, least: int, bits: int) -> bool:
    """Return whether ``times * P[at least `least` marked among `drawn`] < 2^-bits``, exactly."""
    low = max(least, 0, drawn - (population - marked))
    high = min(marked, drawn)
    if low > high:
        return True
    term = comb(marked, low) * comb(population - marked, drawn - low)
    tail = term
    for count in range(low, high):
        others = population - marked - drawn + count + 1
        term = term * (marked - count) * (drawn - count) // ((count + 1) * others)
        tail += term
    return (times * tail) << bits < comb(population, drawn)


def _connected(parties: int, bad: int, reach: int) -> bool:
    """Return whether a cut is rarer than 2^-40.

    A cut is two places with ``reach`` bad parties in a row each.
    """
    if bad < 2 * reach:
        return True
    cuts = comb(parties, 2) * comb(parties - 2 * reach, bad - 2 * reach)
    return cuts << PRIVACY < comb(parties, bad)


@dataclass(frozen=True)
class Graph:
    """Parties on a circle, each joined to ``degree / 2`` parties on each side, or all to all."""

    order: tuple[int, ...]
    degree: int

    def neighbours(self, site: int) -> tuple[int, ...]:
        """Return the ids joined to ``site``, sorted, without ``site`` itself.

        Raises:
            ParameterError: ``site`` is not on the circle.
        """
        if site not in self.order:
            raise ParameterError("a site is not on the graph")
        if self.degree >= len(self.order) - 1:
            return tuple(sorted(other for other in self.order if other != site))
        place, size = self.order.index(site), len(self.order)
        reach = range(1, self.degree // 2 + 1)
        return tuple(
            sorted(self.order[(place + sign * step) % size] for step in reach for sign in (1, -1))
        )

    def holders(self, site: int) -> tuple[int, ...]:
        """Return the ids with a share of ``site``'s secrets, sorted: its neighbours and itself."""
        return tuple(sorted((site, *self.neighbours(site))))


def arrange(sites: Iterable[int], seed: bytes, degree: int) -> Graph:
    """Return the graph with ``sites`` in the order of SHA-256(label, ``seed``, id).

    ``seed`` is the 32-byte hash of all advertisements.
    """

    def place(site: int) -> bytes:
        return hashlib.sha256(b"fedgraft-secagg/1 graph" + seed + site.to_bytes(8, "big")).digest()

    return Graph(tuple(sorted(sites, key=place)), degree)
