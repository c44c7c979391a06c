"""The rounds of a federation: choose a cohort, have it train, make the next adapter, evaluate it.

Read ``run_job``, then ``run_round``. This module reaches sites only through ``Transport.ask``, and
updates only through an aggregation rule. Therefore it is the same for a simulation and for partner
sites.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedgraft.common.aggregation import RULES
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError, RoundAborted
from fedgraft.common.layout import Vector
from fedgraft.common.messages.payloads import EvaluateRequest, TrainRequest
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.seeds import derive_seed
from fedgraft.server import optimizers
from fedgraft.server.plan import Plan
from fedgraft.server.protocol.clear import evaluate_clear, gather_clear
from fedgraft.server.protocol.masked import evaluate_masked, gather_masked
from fedgraft.server.protocol.transport import SILENT, Reply, Transport
from fedgraft.server.state import (
    Dropped,
    Evaluated,
    Gathered,
    RoundRecord,
    State,
    Traffic,
    better_score,
)

__all__ = ["choose_cohort", "run_job", "run_round"]

ATTEMPTS = 3  # attempts at one round before the run gives up


def run_job(
    plan: Plan,
    transport: Transport,
    state: State,
    *,
    commit: Callable[[State, RoundRecord], None],
    warn: Callable[[str, Sequence[Dropped]], None],
) -> State:
    """Run rounds from ``state`` to the job's count or early stopping; return the last state.

    ``commit`` is called after every round and must make it durable before it returns. ``warn`` is
    called with the sites that do not take part, and with the reason if a round did not count.

    Raises:
        InputError: the job asks for secure aggregation and the plan has no ``masking``.
        RoundAborted: a round failed three times in a row. It is TooFewSites if fewer replies were
            usable than ``min_sites``, or than secure aggregation needs.
    """
    if plan.job.privacy.secure_aggregation.enabled and plan.masking is None:
        raise InputError(
            "secure aggregation needs the sites' public keys", hint="name the federation file"
        )
    attempt = 0
    while state.round < plan.job.rounds.count and not _stopped(plan.job, state):
        refused = _invite(plan, transport)
        if refused:
            warn("refused to take part", refused)
        try:
            state, record = run_round(plan, transport, state, attempt)
        except RoundAborted as error:
            attempt += 1
            warn(str(error), ())
            if attempt == ATTEMPTS:
                raise
            continue
        attempt = 0
        commit(state, record)
    return state


def run_round(
    plan: Plan, transport: Transport, state: State, attempt: int = 0
) -> tuple[State, RoundRecord]:
    """Run one round: train at the cohort, add up the valid updates, step, evaluate.

    Return the new state and the record of the round. Another ``attempt`` at a failed round draws
    another cohort.

    Raises:
        RoundAborted: the round failed; ``state`` is then still valid.
    """
    started = time.monotonic()
    job, number = plan.job, state.round + 1
    cohort = choose_cohort(job, transport.sites, number, attempt)
    gathered = _train(plan, transport, cohort, (number, attempt), state.adapter)
    step = RULES[job.aggregation.rule].merge(gathered.update)
    settings, done = job.aggregation.server_optimizer, state.round / job.rounds.count
    adapter, moments = optimizers.apply(settings, state.adapter, step, state.moments, done=done)
    state = replace(state, round=number, adapter=adapter, moments=moments)
    evaluated = _evaluate(plan, transport, _judges(job, transport, cohort, gathered), state)
    tally, traffic = evaluated.tally, (gathered.traffic, evaluated.traffic)
    state = _judge(job, state, tally)
    record = RoundRecord(
        round=number,
        asked=len(cohort),
        sites=gathered.count,
        dropped=tuple(drop for part in traffic for drop in part.dropped),
        examples=gathered.examples,
        train_loss=gathered.loss,
        update_norm=float(np.linalg.norm(step)),
        validation=_validation(job, tally),
        bytes_up=sum(part.bytes_up for part in traffic),
        bytes_down=sum(part.bytes_down for part in traffic),
        seconds=time.monotonic() - started,
        masked=gathered.masked,
    )
    return state, record


def _validation(job: Job, tally: Tally) -> dict[str, Any] | None:
    if not tally.examples:
        return None
    return {**job.measures.figures(tally), "examples": tally.examples}


def _train(
    plan: Plan,
    transport: Transport,
    cohort: Sequence[str],
    number: tuple[int, int],
    adapter: Vector,
) -> Gathered:
    """Train ``adapter`` at the cohort, masked if the job asks for it.

    ``number`` is (round, attempt).
    """
    job, names = plan.job, plan.exchanged.names
    request = TrainRequest(plan.session, *number, plan.request.job, names, adapter)
    if plan.masking:
        return gather_masked(plan.masking, job, transport, cohort, request, plan.exchanged)
    return gather_clear(job, transport, cohort, request, plan.exchanged, plan.halfway)


def _evaluate(plan: Plan, transport: Transport, sites: Sequence[str], state: State) -> Evaluated:
    """Evaluate the new adapter at ``sites``, if federated validation is due after this round."""
    job, names = plan.job, plan.exchanged.names
    last = state.round == job.rounds.count
    if not job.data.validation or not (last or state.round % job.rounds.evaluate_every == 0):
        return Evaluated(Tally.empty(job.measures), Traffic())
    request = EvaluateRequest(
        plan.session, state.round, plan.request.job, names, "validation", state.adapter
    )
    if plan.masking:
        return evaluate_masked(plan.masking, job, transport, sites, request)
    return evaluate_clear(job, transport, sites, request, plan.exchanged)


def choose_cohort(job: Job, sites: Sequence[str], number: int, attempt: int = 0) -> tuple[str, ...]:
    """Return the cohort of round ``number``, sorted: the sites with the smallest hashes.

    The hash is of (seed, round, attempt, site). A site's hash does not depend on the other sites
    that are present, or on the order in which they came.
    """
    size = job.rounds.cohort_size(len(sites))
    draw = ("cohort", number, attempt)
    ranked = sorted(sites, key=lambda site: derive_seed(job.job.seed, *draw, site))
    return tuple(sorted(ranked[:size]))


def _judges(
    job: Job, transport: Transport, cohort: Sequence[str], gathered: Gathered
) -> tuple[str, ...]:
    """Return the sites that evaluate: the cohort, or with early stopping all sites.

    Early stopping compares rounds, so every round must be evaluated at the same sites. A site that
    did not answer is left out, because it would be waited for a second time.
    """
    silent = {drop.site for drop in gathered.traffic.dropped if drop.reason in SILENT}
    sites = transport.sites if job.rounds.early_stopping else cohort
    return tuple(site for site in sites if site not in silent)


def _judge(job: Job, state: State, tally: Tally) -> State:
    """Return ``state`` with the best adapter by federated validation, for early stopping."""
    stopping = job.rounds.early_stopping
    if stopping is None or not tally.examples:
        return state
    score = better_score(stopping, job.measures.figures(tally), state.best_score)
    if score is None:
        return replace(state, stale=state.stale + 1)
    return replace(state, best=state.adapter, best_score=score, stale=0)


def _stopped(job: Job, state: State) -> bool:
    stopping = job.rounds.early_stopping
    return stopping is not None and state.stale >= stopping.patience


def _invite(plan: Plan, transport: Transport) -> list[Dropped]:
    """Invite the new nodes; return those that did not join, with the reason.

    A node that did not join is asked again only if there are too few sites. Otherwise one node
    that hangs would make every round wait for its deadline.
    """
    rounds = plan.job.rounds
    again = len(transport.sites) < rounds.min_sites
    members = plan.masking.federation.ids if plan.masking else None
    replies: list[Reply] = list(
        transport.invite(plan.request, rounds.deadline, again=again, members=members)
    )
    return [Dropped(reply.site, reply.failure) for reply in replies if reply.payload is None]
