"""The replies of a site in one round, filled with zeros.

They are made before anything is sent. The site uses them to report the data that would leave it;
the coordinator uses them to compute the cost of a job.
"""

import numpy as np

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.masked_terms import evaluation_terms, training_terms
from fedgraft.common.messages.payloads import EvaluateReply, Reply, TrainReply
from fedgraft.common.metrics.tally import Tally
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
from fedgraft.common.secagg.transcript import Parameters

__all__ = ["NO_SESSION", "blank_replies"]

NO_SESSION = "00" * 16


def blank_replies(job: Job, exchanged: Layout, cohort: int) -> list[Reply]:
    """Return the replies of one of ``cohort`` sites in a round with training and evaluation.

    Training sends the tensors ``exchanged``.
    """
    if job.privacy.secure_aggregation.enabled:
        return _masked(job, exchanged, tuple(range(cohort)))
    update = np.zeros(exchanged.size, np.float32)
    trained = TrainReply(NO_SESSION, 1, exchanged.fingerprint, 1, 0.0, update)
    if not job.data.validation:
        return [trained]
    tally = Tally.empty(job.measures).to_vector()
    return [trained, EvaluateReply(NO_SESSION, 1, tally)]


def _masked(job: Job, exchanged: Layout, cohort: tuple[int, ...]) -> list[Reply]:
    """Return the replies of all five stages, once for training and once for validation."""
    works = [training_terms(job, NO_SESSION, cohort, exchanged)]
    if job.data.validation:
        works.append(evaluation_terms(job, NO_SESSION, cohort))
    return [reply for terms in works for reply in _stages(terms)]


def _stages(terms: Parameters) -> list[Reply]:
    neighbours = range(1, terms.plan.degree + 1)
    digest, signature = bytes(32), bytes(64)
    size = packed_size(terms.length, terms.coding.ring_bits)
    return [
        Advertisement(0, digest, digest, digest, signature),
        SealedShares(0, tuple(Envelope(0, other, bytes(80)) for other in neighbours)),
        MaskedInput(0, np.zeros(size, np.uint8), signature),
        Confirmation(0, signature),
        Opening(0, tuple(RevealedShare(owner, digest) for owner in (0, *neighbours))),
    ]
