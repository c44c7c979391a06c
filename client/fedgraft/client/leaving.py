"""What would leave a site in one round of a job, counted before anything does."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedgraft.common.adapters import Layout
from fedgraft.common.job import Job
from fedgraft.common.messages import encode, wire_bytes
from fedgraft.common.metrics import Tally
from fedgraft.common.payloads import EvaluateReply, Reply, TrainReply
from fedgraft.common.privacy import FEWEST
from fedgraft.common.secagg.quantize import packed_size
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Envelope,
    MaskedInput,
    Opening,
    RevealedShare,
    SealedShares,
)
from fedgraft.common.terms import evaluation_terms, training_terms

__all__ = ["Leaving", "what_leaves"]

NO_SESSION = "00" * 16


@dataclass(frozen=True)
class Leaving:
    """``tensors`` by name with ``parameters`` values in all; bytes of a round with evaluation."""

    tensors: tuple[str, ...]
    parameters: int
    bytes_per_round: int
    rounds: int
    masked: bool

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self) | {"tensors": list(self.tensors)}

    def in_words(self) -> str:
        """One sentence."""
        how = "masked, so that only sums over sites can be read" if self.masked else "in clear"
        return (
            f"{len(self.tensors)} tensors with {self.parameters:,} values, "
            f"{self.bytes_per_round / 1e6:.2f} MB a round in {self.rounds} rounds, {how}"
        )


def what_leaves(job: Job, exchanged: Layout, sites: int) -> Leaving:
    """What one of ``sites`` sites sends in one round that trains ``exchanged`` and evaluates."""
    masked = job.privacy.secure_aggregation.enabled
    replies = _masked(job, exchanged, sites) if masked else _clear(job, exchanged)
    size = sum(wire_bytes(encode(reply)) for reply in replies)
    return Leaving(exchanged.names, exchanged.size, size, job.rounds.count, masked)


def _clear(job: Job, exchanged: Layout) -> list[Reply]:
    update = np.zeros(exchanged.size, np.float32)
    tally = Tally.empty(job.job.classes).to_vector()
    trained = TrainReply(NO_SESSION, 1, exchanged.fingerprint, 1, 0.0, update)
    return [trained, *([EvaluateReply(NO_SESSION, 1, tally)] if job.data.validation else [])]


def _masked(job: Job, exchanged: Layout, sites: int) -> list[Reply]:
    most = job.privacy.secure_aggregation.max_sites
    cohort = tuple(range(min(max(job.rounds.cohort_size(sites), FEWEST), most)))
    works = [training_terms(job, NO_SESSION, cohort, exchanged)]
    if job.data.validation:
        works.append(evaluation_terms(job, NO_SESSION, cohort))
    digest, signature = bytes(32), bytes(64)
    replies: list[Reply] = []
    for terms in works:
        neighbours = range(1, terms.plan.degree + 1)
        size = packed_size(terms.length, terms.coding.ring_bits)
        replies += [
            Advertisement(0, digest, digest, digest, signature),
            SealedShares(0, tuple(Envelope(0, other, bytes(80)) for other in neighbours)),
            MaskedInput(0, np.zeros(size, np.uint8), signature),
            Confirmation(0, signature),
            Opening(0, tuple(RevealedShare(owner, digest) for owner in (0, *neighbours))),
        ]
    return replies
