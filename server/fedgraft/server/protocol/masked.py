"""The coordinator's side of a masked round: five stages and one sum, no update of a single site.

The stages are KEYS -> SHARES -> TRAIN or EVALUATE -> CONFIRM -> UNMASK. They use ``Transport.ask``
like all other requests. ``UnmaskingServer`` decides which replies count. A site that does not
answer one stage is not asked at the next. No request is sent twice, because a site answers each
request only once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedgraft.common.config.job import Job
from fedgraft.common.errors import MessageError, RoundAborted, TooFewSites
from fedgraft.common.federation.federation_file import Federation
from fedgraft.common.layout import Layout
from fedgraft.common.messages.codec import Stage
from fedgraft.common.messages.masked_terms import (
    describe,
    evaluation_terms,
    floor_for,
    hash_work,
    join_losses,
    training_terms,
)
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    Request,
    SharesAsk,
    TrainRequest,
    UnmaskAsk,
)
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.secagg.errors import (
    ParameterError,
    SecAggError,
    StatementError,
    TooFewParties,
)
from fedgraft.common.secagg.quantize import error_bound, mean
from fedgraft.common.secagg.statements import Aggregate
from fedgraft.common.secagg.transcript import Parameters
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.protocol.unmasking_server import UnmaskingServer
from fedgraft.server.state import Evaluated, Gathered, Traffic

__all__ = ["Masking", "evaluate_masked", "gather_masked"]

PROMPT = 120.0  # seconds for a stage that only computes keys or signatures


@dataclass(frozen=True)
class Masking:
    """The sites that may be in a masked round.

    ``next_number`` returns a greater number for each masked round, also after a crash.
    """

    federation: Federation
    next_number: Callable[[], int]


def gather_masked(
    masking: Masking,
    job: Job,
    transport: Transport,
    cohort: Sequence[str],
    request: TrainRequest,
    exchanged: Layout,
) -> Gathered:
    """Have the cohort train; return the weighted mean of its updates, from the masked sum.

    Raises:
        RoundAborted: no sum was opened; TooFewSites if sites were missing.
    """

    def terms(ids: tuple[int, ...]) -> Parameters:
        return training_terms(job, request.session, ids, exchanged)

    talk = _Conversation(masking, job, transport, cohort)
    parameters, total = talk.hold(request, terms, job.rounds.min_sites)
    coding, count = parameters.coding, len(total.survivors)
    update = mean(total.sums, total.weight, coding).astype(np.float64)
    if not float(np.linalg.norm(update)) <= job.aggregation.max_update_norm:
        raise RoundAborted(
            f"round {request.round}: the mean update is larger than max_update_norm",
            hint="a site may have sent nonsense; if not, raise aggregation.max_update_norm",
        )
    loss, clipped = total.metrics
    by_examples = job.aggregation.weights == "examples"
    unit = job.privacy.secure_aggregation.weights(job.measures.most_parts)[1]
    return Gathered(
        update=update,
        count=count,
        examples=total.weight * unit if by_examples else None,
        loss=loss * coding.max_weight / total.weight,
        traffic=talk.traffic,
        masked={
            **_protection(parameters, total),
            "clipped": min(max(clipped / count, 0.0), 1.0),
            "error_bound": error_bound(count, total.weight, coding),
        },
    )


def evaluate_masked(
    masking: Masking,
    job: Job,
    transport: Transport,
    cohort: Sequence[str],
    request: EvaluateRequest,
) -> Evaluated:
    """Have the cohort evaluate; return the sum of its tallies, empty if no sum can be opened."""

    def terms(ids: tuple[int, ...]) -> Parameters:
        return evaluation_terms(job, request.session, ids)

    talk = _Conversation(masking, job, transport, cohort)
    try:
        parameters, total = talk.hold(request, terms, job.rounds.min_sites)
    except RoundAborted as error:
        talk.traffic.drop("all sites", f"evaluation: {error}")
        return Evaluated(Tally.empty(job.measures), talk.traffic)
    counts = total.sums.astype(np.int64)
    try:
        loss = join_losses(total.metrics, parameters.coding)
        tally = Tally.of_counts(max(loss, 0.0), counts, job.measures)
    except MessageError as error:
        talk.traffic.drop("all sites", f"evaluation: {error}")
        tally = Tally.empty(job.measures)
    return Evaluated(tally, talk.traffic)


@dataclass
class _Conversation:
    """One masked round with a cohort, and its traffic."""

    masking: Masking
    job: Job
    transport: Transport
    cohort: Sequence[str]
    traffic: Traffic = field(default_factory=Traffic)

    def hold(
        self,
        request: TrainRequest | EvaluateRequest,
        terms: Callable[[tuple[int, ...]], Parameters],
        min_sites: int,
    ) -> tuple[Parameters, Aggregate]:
        """Run the masked round; return its terms and the opened sum.

        Raises:
            RoundAborted: no sum was opened; TooFewSites if sites were missing.
        """
        ids = self.masking.federation.ids
        try:
            parameters = terms(tuple(sorted(ids[site] for site in self.cohort)))
            return parameters, self._ask_all(parameters, request, min_sites)
        except (TooFewParties, ParameterError) as error:
            raise TooFewSites(
                f"round {request.round}: {error}{self._reasons()}",
                hint="look at the sites named, raise rounds.deadline, or wait for more sites",
            ) from None
        except SecAggError as error:
            names = ", ".join(self.masking.federation.names[site] for site in error.culprits)
            raise RoundAborted(
                f"round {request.round}: {error}" + (f" (look at {names})" if names else ""),
                hint=error.hint,
            ) from None

    def _ask_all(
        self, parameters: Parameters, request: TrainRequest | EvaluateRequest, min_sites: int
    ) -> Aggregate:
        """Run the five stages in order; return the opened sum."""
        session, work, federation = request.session, describe(request), self.masking.federation
        server = UnmaskingServer(
            roster=federation.roster,
            policy=floor_for(federation.policy, parameters, work.stage),
            parameters=parameters,
            round_number=self.masking.next_number(),
            model=hash_work(work),
            threads=os.cpu_count() or 1,  # the sum is the same on any number
        )
        begin = KeysAsk(session, work, parameters.cohort, server.keys_request())
        asks = dict.fromkeys(parameters.cohort, begin)
        sites = self._ask(Stage.KEYS, asks, server.add_advertisement)
        share = SharesAsk(session, server.close_keys())
        self._ask(Stage.SHARES, dict.fromkeys(sites, share), server.add_shares)
        deliveries = server.close_shares()
        tasks = {
            site: MaskedTrain(request, delivery)
            if isinstance(request, TrainRequest)
            else MaskedEvaluate(request, delivery)
            for site, delivery in deliveries.items()
        }
        self._ask(Stage(work.stage), tasks, server.add_masked)
        survivors = server.close_training()
        if len(survivors.masked) < min_sites:
            raise TooFewParties(f"only {len(survivors.masked)} sites, min_sites is {min_sites}")
        confirm = ConfirmAsk(session, survivors)
        sites = self._ask(
            Stage.CONFIRM, dict.fromkeys(survivors.masked, confirm), server.add_confirmation
        )
        unmask = UnmaskAsk(session, server.close_confirm())
        self._ask(Stage.UNMASK, dict.fromkeys(sites, unmask), server.add_opening)
        return server.finish()

    def _ask(
        self, stage: Stage, requests: Mapping[int, Request], add: Callable[[Any], None]
    ) -> list[int]:
        """Ask sites by id; return the ids of those whose reply ``add`` accepted."""
        names, deadline = self.masking.federation.names, self.job.rounds.deadline
        working = stage in (Stage.TRAIN, Stage.EVALUATE)
        by_name = {names[site]: request for site, request in requests.items()}
        taken = []
        for reply in self.transport.ask(
            by_name, stage, by_name, deadline if working else min(deadline, PROMPT)
        ):
            self.traffic.count(up=reply.bytes_up, down=reply.bytes_down)
            site = self.masking.federation.ids[reply.site]
            if reply.payload is None:
                self.traffic.drop(reply.site, self._named(reply.failure))
            elif getattr(reply.payload, "site", None) != site:
                self.traffic.drop(reply.site, "another-sites-id")
            else:
                try:
                    add(reply.payload)
                    taken.append(site)
                except StatementError:
                    self.traffic.drop(reply.site, f"bad-{stage.name.lower()}")
        return taken

    def _named(self, failure: str) -> str:
        """Return a failure code for people: a blamed site is given by its name, not its id."""
        names, (kind, _, site) = self.masking.federation.names, failure.partition("-")
        if kind == "blames" and site.isdecimal() and int(site) < len(names):
            return f"blames {names[int(site)]}"
        return failure

    def _reasons(self) -> str:
        listed = ", ".join(f"{drop.site}: {drop.reason}" for drop in self.traffic.dropped[:5])
        return f" ({listed})" if listed else ""


def _protection(parameters: Parameters, total: Aggregate) -> dict[str, Any]:
    """Return how this round was protected, for its record."""
    plan, coding = parameters.plan, parameters.coding
    return {
        "cohort": plan.parties,
        "survivors": len(total.survivors),
        "colluders": plan.colluders,
        "dropouts": plan.dropouts,
        "degree": plan.degree,
        "share_threshold": plan.share_threshold,
        "sign_threshold": plan.sign_threshold,
        "ring_bits": coding.ring_bits,
        "value_bits": coding.value_bits,
        "clip": coding.clip,
    }
