"""The terms of a masked round, which coordinator and sites compute separately from job and cohort.

A masked round either trains or evaluates. A site derives the terms from the job, its own model and
its own federation file; it relies on the coordinator only for the cohort. If another party computes
other terms, it has another context, and no signature matches.
"""

import math
from dataclasses import replace

import numpy as np

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.payloads import EvaluateRequest, TrainRequest, Work
from fedgraft.common.secagg.quantize import Coding
from fedgraft.common.secagg.transcript import (
    Parameters,
    Policy,
    digest,
    encode,
    hash_adapter,
    hash_model,
)

__all__ = [
    "describe",
    "evaluation_terms",
    "floor_for",
    "hash_work",
    "join_losses",
    "split_loss",
    "training_terms",
]


def training_terms(
    job: Job, session: str, cohort: tuple[int, ...], exchanged: Layout
) -> Parameters:
    """Return the terms of a round that trains ``exchanged``; ``cohort`` are ids, ascending.

    Raises:
        ParameterError: the cohort is too small, too large or malformed.
    """
    by_examples = job.aggregation.weights == "examples"
    masked, parts = job.privacy.secure_aggregation, job.measures.most_parts
    coding = masked.coding(by_examples=by_examples, most_parts=parts)
    layout = bytes.fromhex(exchanged.fingerprint)
    return _terms(job, session, cohort, layout, exchanged.size, coding)


def evaluation_terms(job: Job, session: str, cohort: tuple[int, ...]) -> Parameters:
    """Return the terms of a round that evaluates: a vector of ``Tally.counts``, summed exactly.

    With ``clip`` equal to the number of levels, weight 1 and no random rounding, quantisation does
    not change an integer. A site with a larger count than ``clip`` abstains: no count is clipped.

    Raises:
        ParameterError: as ``training_terms``.
    """
    parties = job.privacy.secure_aggregation.max_sites
    bits = (((1 << 31) - 1) // parties + 1).bit_length()
    levels = (1 << (bits - 1)) - 1
    measures = job.measures
    limit = measures.loss_limit
    coding = Coding(parties, float(levels), 32, bits, max_weight=1, metric_limit=limit)
    layout = digest("tally", *job.job.labels, *measures.named)
    length = measures.classes**2 + measures.size
    return _terms(job, session, cohort, layout, length, coding)


def split_loss(loss: float, coding: Coding) -> tuple[float, float]:
    """Return a sum of losses as the two metrics of a masked evaluation: a coarse and a fine part.

    One metric has 2^31 levels for the sums of all sites up to the largest loss: for a small site a
    level is a large part of its loss. The fine part is what is left below a level, spread over all
    levels. A site of an earlier version sends 0 as the fine part.
    """
    level = coding.metric_limit / coding.metric_levels
    whole = math.floor(loss / level)
    return whole * level, min(max(loss / level - whole, 0.0), 1.0) * coding.metric_limit


def join_losses(metrics: tuple[float, ...], coding: Coding) -> float:
    """Return the sum of losses over sites from the sums of the coarse and of the fine part."""
    coarse, fine = metrics
    return coarse + fine / coding.metric_levels


def _terms(
    job: Job, session: str, cohort: tuple[int, ...], layout: bytes, length: int, coding: Coding
) -> Parameters:
    colluders, dropouts = job.privacy.secure_aggregation.numbers(len(cohort))
    return Parameters(bytes.fromhex(session), cohort, layout, length, colluders, dropouts, coding)


def floor_for(policy: Policy, parameters: Parameters, stage: str) -> Policy:
    """Return the floor for a round; the limit of ``clip`` applies to updates, not to counts."""
    return policy if stage == "train" else replace(policy, max_clip=parameters.coding.clip)


def describe(request: TrainRequest | EvaluateRequest) -> Work:
    """Return the work of a request; the adapter is given only by its hash."""
    trains = isinstance(request, TrainRequest)
    return Work(
        stage="train" if trains else "evaluate",
        round=request.round,
        attempt=request.attempt if isinstance(request, TrainRequest) else 0,
        split="train" if isinstance(request, TrainRequest) else request.split,
        job=request.job,
        names=request.names,
        adapter=hash_adapter(np.asarray(request.adapter)),
    )


def hash_work(work: Work) -> bytes:
    """Return the hash of the work, which must be equal for all sites of a round.

    It does not depend on the session.
    """
    settings = encode(work.stage, work.round, work.attempt, work.split, work.job, *work.names)
    return hash_model(work.adapter, settings)
