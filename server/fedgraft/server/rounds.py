"""The story of a federation: who is asked, what comes back, and how it becomes the next adapter.

Read ``run_job``, then ``run_round``. Everything here sees sites only through ``Transport.ask`` and
numbers only through a rule, so it is the same for a simulation and for partner sites.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedgraft.common.adapters import Layout, Vector
from fedgraft.common.errors import MessageError, TooFewSites
from fedgraft.common.job import Job
from fedgraft.common.messages import (
    EvaluateReply,
    EvaluateRequest,
    PlanRequest,
    Stage,
    TrainReply,
    TrainRequest,
    encode,
    wire_bytes,
)
from fedgraft.common.metrics import Tally
from fedgraft.common.seeds import derive_seed
from fedgraft.common.workbench import Workbench
from fedgraft.server.aggregation import RULES, RunningMean, optimizers
from fedgraft.server.state import Dropped, RoundRecord, State
from fedgraft.server.transport import SILENT, Reply, Transport
from fedgraft.server.validation import Expected, InvalidReply, check_evaluation, check_update

__all__ = ["Plan", "make_plan", "run_job", "run_round"]

ATTEMPTS = 3  # at a round with too few sites, before the run gives up


@dataclass(frozen=True)
class Plan:
    """What a job means for this federation: which tensors travel, what every message says."""

    job: Job
    session: str
    exchanged: Layout
    request: PlanRequest


def make_plan(job: Job, bench: Workbench, session: str) -> Plan:
    """Which tensors travel under the job's rule and head policy, and the invitation to sites."""
    rule = RULES[job.aggregation.rule]
    local = set(bench.local.names)
    names = tuple(name for name in rule.exchanges(bench.layout) if name not in local)
    exchanged = bench.layout.only(names)
    request = PlanRequest(
        session=session,
        job=job.for_sites().model_dump_json(),
        backbone=bench.backbone.fingerprint,
        layout=exchanged.fingerprint,
        names=names,
        fixed=bench.fixed_hash({*names, *local}),
    )
    return Plan(job, session, exchanged, request)


def run_job(
    plan: Plan,
    transport: Transport,
    state: State,
    *,
    commit: Callable[[State, RoundRecord], None],
    warn: Callable[[str, Sequence[Dropped]], None],
) -> State:
    """Run rounds from ``state`` until the job's count or early stopping; the last state.

    ``commit`` is called after every round and must make it durable before it returns; ``warn`` is
    told of sites that do not take part, or of a round that did not count.

    Raises:
        TooFewSites: a round had fewer than ``min_sites`` usable replies three times in a row.
    """
    attempt = 0
    while state.round < plan.job.rounds.count and not _stopped(plan.job, state):
        refused = _invite(plan, transport)
        if refused:
            warn("refused to take part", refused)
        try:
            state, record = run_round(plan, transport, state, attempt)
        except TooFewSites as error:
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
    """One round: train at the cohort, add up what is valid, step, evaluate.

    Another ``attempt`` at a round that had too few sites draws another cohort.

    Raises:
        TooFewSites: fewer usable updates than ``min_sites``; ``state`` is then still the truth.
    """
    started = time.monotonic()
    job, number = plan.job, state.round + 1
    cohort = choose_cohort(job, transport.sites, number, attempt)
    gathered = _gather_updates(plan, transport, cohort, number, state.adapter)
    if gathered.mean.count < job.rounds.min_sites:
        raise _too_few(job, number, gathered)
    step = RULES[job.aggregation.rule].merge(gathered.mean.mean())
    adapter, moments = optimizers.apply(
        job.aggregation.server_optimizer, state.adapter, step, state.moments
    )
    state = replace(state, round=number, adapter=adapter, moments=moments)
    checked = _evaluate(plan, transport, _judges(job, transport, cohort, gathered), state)
    state = _judge(job, state, checked.tally)
    tally = checked.tally
    record = RoundRecord(
        round=number,
        asked=len(cohort),
        sites=gathered.mean.count,
        dropped=(*gathered.dropped, *checked.dropped),
        examples=gathered.examples,
        train_loss=gathered.loss / gathered.examples,
        update_norm=float(np.linalg.norm(step)),
        validation={**tally.summary(), "examples": tally.examples} if tally.examples else None,
        bytes_up=gathered.bytes_up + checked.bytes_up,
        bytes_down=gathered.bytes_down + checked.bytes_down,
        seconds=time.monotonic() - started,
    )
    return state, record


def choose_cohort(job: Job, sites: Sequence[str], number: int, attempt: int = 0) -> tuple[str, ...]:
    """The sites of round ``number``: those with the smallest hash of (seed, round, site), sorted.

    A site's chance does not depend on who else is present or in which order they came.
    """
    size = job.rounds.cohort_size(len(sites))
    draw = ("cohort", number, attempt)
    ranked = sorted(sites, key=lambda site: derive_seed(job.job.seed, *draw, site))
    return tuple(sorted(ranked[:size]))


@dataclass
class _Gathered:
    """What training has collected so far; grows by numbers, never by updates."""

    mean: RunningMean
    dropped: list[Dropped] = field(default_factory=list)
    examples: int = 0
    loss: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def drop(self, site: str, reason: str) -> None:
        self.dropped.append(Dropped(site, reason))


def _gather_updates(
    plan: Plan, transport: Transport, cohort: Sequence[str], number: int, adapter: Vector
) -> _Gathered:
    """Ask the cohort to train; each valid update goes into the running mean and is forgotten."""
    job, names = plan.job, plan.exchanged.names
    request = TrainRequest(plan.session, number, plan.request.job, names, adapter)
    expected = Expected(plan.session, number, plan.exchanged)
    gathered = _Gathered(RunningMean(plan.exchanged.size))
    gathered.bytes_down = wire_bytes(encode(request)) * len(cohort)
    for reply in transport.ask(cohort, Stage.TRAIN, request, job.rounds.deadline):
        gathered.bytes_up += reply.bytes_up
        update = reply.payload
        if not isinstance(update, TrainReply):
            gathered.drop(reply.site, reply.failure)
            continue
        try:
            check_update(update, expected, job.aggregation)
        except InvalidReply as error:
            gathered.drop(reply.site, str(error))
            continue
        by_examples = job.aggregation.weights == "examples"
        gathered.mean.add(update.update, float(update.examples) if by_examples else 1.0)
        gathered.examples += update.examples
        gathered.loss += update.loss * update.examples
    return gathered


@dataclass
class _Checked:
    """What federated validation has collected so far; an empty tally when it was not due."""

    tally: Tally
    dropped: list[Dropped] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0


def _evaluate(plan: Plan, transport: Transport, sites: Sequence[str], state: State) -> _Checked:
    """Federated validation of the new adapter at ``sites``, if it is due after this round."""
    job, names = plan.job, plan.exchanged.names
    checked = _Checked(Tally.empty(len(job.job.labels)))
    last = state.round == job.rounds.count
    if not job.data.validation or not (last or state.round % job.rounds.evaluate_every == 0):
        return checked
    session, text = plan.session, plan.request.job
    request = EvaluateRequest(session, state.round, text, names, "validation", state.adapter)
    expected = Expected(session, state.round, plan.exchanged)
    checked.bytes_down = wire_bytes(encode(request)) * len(sites)
    for reply in transport.ask(sites, Stage.EVALUATE, request, job.rounds.deadline):
        checked.bytes_up += reply.bytes_up
        if isinstance(reply.payload, EvaluateReply):
            try:
                checked.tally += check_evaluation(
                    reply.payload, expected, job.aggregation, len(job.job.labels)
                )
            except (InvalidReply, MessageError) as error:
                checked.dropped.append(Dropped(reply.site, f"evaluation: {error}"))
        elif reply.failure != "no-examples":  # a small site may hold none out
            checked.dropped.append(Dropped(reply.site, f"evaluation: {reply.failure}"))
    return checked


def _judges(
    job: Job, transport: Transport, cohort: Sequence[str], gathered: _Gathered
) -> tuple[str, ...]:
    """Who evaluates: the cohort, or everyone where rounds must be comparable to stop early.

    A site that did not answer is not waited for a second time.
    """
    silent = {drop.site for drop in gathered.dropped if drop.reason in SILENT}
    sites = transport.sites if job.rounds.early_stopping else cohort
    return tuple(site for site in sites if site not in silent)


def _judge(job: Job, state: State, tally: Tally) -> State:
    """Early stopping: remember the best adapter by federated validation."""
    stopping = job.rounds.early_stopping
    if stopping is None or not tally.examples:
        return state
    value = tally.summary()[stopping.metric]
    score = -value if stopping.metric == "loss" else value
    if state.best_score is None or score > state.best_score + stopping.min_delta:
        return replace(state, best=state.adapter, best_score=score, stale=0)
    return replace(state, stale=state.stale + 1)


def _stopped(job: Job, state: State) -> bool:
    stopping = job.rounds.early_stopping
    return stopping is not None and state.stale >= stopping.patience


def _invite(plan: Plan, transport: Transport) -> list[Dropped]:
    """Invite nodes that are new; those that did not join, with the reason.

    Who did not join once is asked again only when sites are missing: one node that hangs must not
    cost every round its deadline.
    """
    rounds = plan.job.rounds
    again = len(transport.sites) < rounds.min_sites
    replies: list[Reply] = list(transport.invite(plan.request, rounds.deadline, again=again))
    return [Dropped(reply.site, reply.failure) for reply in replies if reply.payload is None]


def _too_few(job: Job, number: int, gathered: _Gathered) -> TooFewSites:
    reasons = ", ".join(f"{drop.site}: {drop.reason}" for drop in gathered.dropped[:5])
    return TooFewSites(
        f"round {number}: {gathered.mean.count} usable updates, min_sites is "
        f"{job.rounds.min_sites}" + (f" ({reasons})" if reasons else ""),
        hint="look at the sites named, raise rounds.deadline, or lower rounds.min_sites",
    )
