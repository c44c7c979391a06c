"""The guard of a site that has a policy: it checks and records every message, in and out.

``admit`` records a request, and checks it against the policy and the agreement. ``consent`` agrees
to a job, or lets a person decide. ``release`` checks a reply against the policy and records it. A
reply that cannot be recorded does not leave. A refusal says nothing about the data, with one
exception: in a job in clear it may tell that there are too few examples, because the replies
contain this number anyway.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.membership.state_files import APPROVALS
from fedgraft.client.policy.approvals import Agreement, Agreements, hash_plan
from fedgraft.client.policy.disclosure import Disclosure
from fedgraft.client.policy.message_log import MessageLog, Occasion
from fedgraft.client.policy.policy_file import METRICS, Policy, RoundFacts, check_plan, load_policy
from fedgraft.client.policy.reasons import keep_reason
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import FedgraftError, MessageError, SiteFailure
from fedgraft.common.layout import Layout
from fedgraft.common.messages.codec import RecordDict, encode, wire_bytes
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    PlanReply,
    PlanRequest,
    Refusal,
    Reply,
    Request,
    ResultReply,
    ResultRequest,
    TrainReply,
    TrainRequest,
    Work,
)
from fedgraft.common.metrics.tally import Tally

__all__ = ["SESSION", "Guard"]

log = logging.getLogger("fedgraft.client")

SESSION = re.compile(r"[0-9a-f]{32}")  # files here have its name


class Guard:
    """The guard for one message: ``policy`` is the path of the policy, ``now`` is local time."""

    def __init__(
        self, policy: Path, state: Path, *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._path, self._state, self._now = policy, state, now
        self.agreements = Agreements(state / APPROVALS)

    @cached_property
    def policy(self) -> Policy:
        """The policy as it is on disk.

        Raises:
            JobError: the policy cannot be read.
        """
        return load_policy(self._path)

    def admit(self, stage: str, request: Request, content: RecordDict, under_way: int) -> None:
        """Record a request, then check it; ``under_way`` is the round of a masked stage.

        Raises:
            SiteFailure: ``audit-failed``, ``disk-full``, ``bad-session``, ``not-agreed``, or a code
                of ``check_plan``.
            JobError: the policy cannot be read.
        """
        try:
            self._message_log.received(self._occasion(stage, request, under_way), request, content)
        except Exception as error:
            log.error("%s cannot be recorded: %s", stage, type(error).__name__)
            raise SiteFailure("audit-failed") from None
        if not SESSION.fullmatch(request.session):
            raise SiteFailure("bad-session")
        if isinstance(request, PlanRequest):
            job = Job.model_validate_json(request.job)
            facts = RoundFacts(job, self._now(), digests=frozenset({request.backbone}))
        else:
            facts = self._facts(request, under_way)
        check_plan(self.policy, facts)
        if isinstance(request, TrainRequest | KeysAsk):  # before there is any work
            self._check_room()

    def _check_room(self) -> None:
        """Check the disk's room for a round's replies, which are kept, and for this site's head."""
        room = 2 * self.policy.limits.max_bytes_out_per_round
        if shutil.disk_usage(self._state).free < room:
            log.error("less than %.0f MB free where %s is", room / 1e6, self._state)
            raise SiteFailure("disk-full")

    def _facts(self, request: Request, under_way: int) -> RoundFacts:
        """Return the facts at a stage after PLAN; the job must be the one agreed to."""
        work = _work(request)
        plan = None if work is None else hash_plan(work.job, work.names)
        agreement = self._agreement(request.session)
        if not agreement.binds(plan, ask=self.policy.approval.mode == "ask"):
            raise SiteFailure("not-agreed")
        return RoundFacts(
            Job.model_validate_json(agreement.job),
            self._now(),
            digests=frozenset({agreement.backbone}) if agreement.backbone else None,
            round=_round(request, under_way),
            works=not isinstance(request, ResultRequest),
            cohort=len(request.cohort) if isinstance(request, KeysAsk) else None,
            survivors=len(request.survivors.masked) if isinstance(request, ConfirmAsk) else None,
        )

    def _agreement(self, session: str) -> Agreement:
        agreement = self.agreements.find(session)
        if agreement is None:
            raise SiteFailure("not-agreed")
        return agreement

    def consent(
        self, request: PlanRequest, job: Job, leaving: Disclosure, examples: int, documents: int
    ) -> None:
        """Agree to a job that this site can do, or let a person decide.

        The job would train on ``examples``, which are of ``documents``.

        Raises:
            SiteFailure: ``approval-pending``, ``approval-denied``, or a code of ``check_plan``. If
                updates are masked, a code about the examples becomes ``not-eligible``.
        """
        check_plan(self.policy, RoundFacts(job, self._now(), bytes_out=leaving.bytes_per_round))
        self.check_amount(job, examples, documents)
        self.agreements.propose(
            request.session,
            request.job,
            request.names,
            leaving.to_json(),
            backbone=request.backbone,
            ask=self.policy.approval.mode == "ask",
        )

    def check_work(self, session: str, job: Job, backbone: str) -> None:
        """Check that a round would compute with the backbone that was agreed to, and is allowed.

        ``backbone`` is the fingerprint of what is here now: its files may have changed since.

        Raises:
            SiteFailure: ``backbone-differs``, ``not-agreed``, or a code of ``check_plan``.
        """
        if self._agreement(session).backbone not in ("", backbone):
            raise SiteFailure("backbone-differs")
        check_plan(self.policy, RoundFacts(job, self._now(), digests=frozenset({backbone})))

    def check_amount(self, job: Job, examples: int, documents: int) -> None:
        """Check that there is enough to train on, at PLAN and again in each round.

        Raises:
            SiteFailure: a code of ``check_plan``; if updates are masked, ``not-eligible``.
        """
        facts = RoundFacts(job, self._now(), examples=examples, documents=documents)
        try:
            check_plan(self.policy, facts)
        except SiteFailure as error:
            if job.privacy.secure_aggregation.enabled:
                raise SiteFailure("not-eligible", str(error)) from None
            raise

    def release(
        self, stage: str, request: Request | None, reply: Reply, under_way: int
    ) -> tuple[Reply, RecordDict]:
        """Return the reply that may leave and its content, recorded; a refusal if it may not leave.

        ``request`` is None if no request could be read.
        """
        session = "" if request is None else request.session
        occasion = self._occasion(stage, request, under_way)
        try:
            return self._recorded(occasion, request, self._checked(reply))
        except SiteFailure as error:
            log.warning("%s: the reply stays here: %s", stage, error)
            keep_reason(self._state, stage, session, error.code, error)
            refusal = Refusal(session, error.code)
        except Exception as error:
            log.error("%s: the reply stays here: %s", stage, type(error).__name__)
            keep_reason(self._state, stage, session, "audit-failed", error)
            refusal = Refusal(session, "audit-failed")
        try:
            return self._recorded(occasion, request, refusal)
        except Exception as error:
            log.error("%s: nothing can be recorded: %s", stage, type(error).__name__)
            return Refusal(session, "audit-failed"), encode(Refusal(session, "audit-failed"))

    def _checked(self, reply: Reply) -> Reply:
        """Return the reply as it may leave: its metrics are allowed, and its losses are rounded."""
        if isinstance(reply, TrainReply):
            self._check_metrics({"loss"})
            return replace(reply, loss=round(reply.loss, self.policy.metrics.round_to))
        if isinstance(reply, EvaluateReply):
            self._check_metrics(set(METRICS))
            return replace(reply, tally=self._rounded(reply))
        return reply

    def _rounded(self, reply: EvaluateReply) -> NDArray[np.float64]:
        """Return the tally of ``reply``; its sum of losses is that of the rounded mean.

        Raises:
            SiteFailure: ``loss-not-finite``, or the sum is too large for a tally.
        """
        job = Job.model_validate_json(self._agreement(reply.session).job)
        try:
            tally = Tally.from_vector(reply.tally, job.measures)
        except MessageError:  # the counts are this site's own, so it is the sum of losses
            raise SiteFailure("loss-not-finite") from None
        mean = round(tally.mean_loss, self.policy.metrics.round_to)
        return replace(tally, loss=mean * tally.examples).to_vector()

    def _check_metrics(self, revealed: set[str]) -> None:
        if not revealed <= set(self.policy.metrics.allowed):
            raise SiteFailure("policy-metrics")

    def _recorded(
        self, occasion: Occasion, request: Request | None, reply: Reply
    ) -> tuple[Reply, RecordDict]:
        content = encode(reply)
        if not isinstance(reply, Refusal | PlanReply | ResultReply):
            most = self.policy.limits.max_bytes_out_per_round
            size = wire_bytes(content)
            self.agreements.spend(occasion.run, occasion.round, size, most=most)
        self._message_log.sent(occasion, reply, content, _layout(request, reply))
        return reply, content

    @cached_property
    def _message_log(self) -> MessageLog:
        return MessageLog(self._state, keep=self._policy_if_any.limits.keep_sent)

    @cached_property
    def _policy_if_any(self) -> Policy:
        """The policy for the record; one that cannot be read allows nothing, like the default."""
        try:
            return self.policy
        except FedgraftError:
            return Policy()

    def _occasion(self, stage: str, request: Request | None, under_way: int) -> Occasion:
        session = "" if request is None else request.session
        run = session if SESSION.fullmatch(session) else ""
        number = 0 if request is None else _round(request, under_way)
        return Occasion(run, number, stage, self._policy_if_any.hash)


def _work(request: Request) -> TrainRequest | EvaluateRequest | ResultRequest | Work | None:
    """Return the part of a request that names job, tensors and round; None if it has none."""
    if isinstance(request, TrainRequest | EvaluateRequest | ResultRequest):
        return request
    if isinstance(request, KeysAsk):
        return request.work
    if isinstance(request, MaskedTrain):
        return request.train
    return request.evaluate if isinstance(request, MaskedEvaluate) else None


def _round(request: Request, under_way: int) -> int:
    if isinstance(request, PlanRequest):
        return 0
    work = _work(request)
    return under_way if work is None else work.round


def _layout(request: Request | None, reply: Reply) -> Layout | None:
    """Return the layout of an update in clear; None for other replies."""
    if not isinstance(request, TrainRequest) or not isinstance(reply, TrainReply):
        return None
    return open_workbench(Job.model_validate_json(request.job)).layout.only(request.names)
