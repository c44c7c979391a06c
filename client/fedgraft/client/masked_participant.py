"""The site's side of a masked round: the work of ``participant``, under the masks of ``secagg``.

KEYS -> SHARES -> TRAIN or EVALUATE -> CONFIRM -> UNMASK. Every error wipes the round. The
coordinator learns only that this site abstains, or which site is at fault, because a reason could
say something about the data. The reason is in the site's own log.
"""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fedgraft.client.membership.identity import load_identity
from fedgraft.client.participant import Participant
from fedgraft.client.secagg.masking_party import MaskingParty
from fedgraft.client.secagg.round_secrets import Memory
from fedgraft.client.secagg.stage_log import AgreedSums, StageLog
from fedgraft.client.training.trainer import Trained, Wanted
from fedgraft.common.config.job import Job
from fedgraft.common.errors import SiteFailure
from fedgraft.common.messages.masked_terms import (
    describe,
    evaluation_terms,
    floor_for,
    hash_work,
    split_loss,
    training_terms,
)
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    SharesAsk,
    TrainRequest,
    UnmaskAsk,
)
from fedgraft.common.secagg.errors import ParameterError, PolicyRefused, SecAggError
from fedgraft.common.secagg.keys import same
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    MaskedInput,
    Opening,
    SealedShares,
)
from fedgraft.common.secagg.transcript import Parameters, Policy
from fedgraft.common.seeds import numpy_generator

__all__ = ["Kept", "MaskedParticipant"]

log = logging.getLogger("fedgraft.client")

STAGES = ("train", "evaluate")
LIFETIME = 86400.0  # seconds that a round may take; a simulation on one machine is slow


@dataclass(frozen=True)
class Kept:
    """The memory of one round: a site keeps it between two messages, ``until`` a Unix time."""

    round: int
    until: float
    memory: Memory


class MaskedParticipant:
    """One site in a masked round; the next stage needs ``kept`` again."""

    def __init__(self, participant: Participant, kept: Kept | None) -> None:
        self.participant = participant
        self.kept = kept

    def keys(self, ask: KeysAsk) -> Advertisement:
        """Begin a round: check the terms, and advertise fresh keys."""
        with self._abstaining():
            work, at = ask.work, self.participant
            job, bench = at.open(ask.session, work.job, work.round)
            if work.stage not in STAGES or not job.privacy.secure_aggregation.enabled:
                raise PolicyRefused("the coordinator asks for something else than was agreed")
            if not same(hash_work(work), ask.request.model):
                raise PolicyRefused("the hash of the work is of other work")
            if work.stage == "train":
                exchanged = bench.layout.only(work.names)
                parameters = training_terms(job, ask.session, ask.cohort, exchanged)
            else:
                parameters = evaluation_terms(job, ask.session, ask.cohort)
            policy = floor_for(at.federation().policy, parameters, work.stage)
            until = time.time() + LIFETIME
            with self._party(parameters, policy, None, (work.round, until)) as party:
                return party.advertise(ask.request)

    def shares(self, ask: SharesAsk) -> SealedShares:
        """Check the keys of all sites; share secrets with neighbours."""
        with self._abstaining(), self._resumed(ask.session) as party:
            return party.share(ask.request)

    def train(self, request: MaskedTrain) -> Generator[Wanted, Trained, MaskedInput]:
        """Train, and mask the update, the site's weight and the loss."""
        with self._abstaining(), self._resumed(request.session) as party:
            party.accept(request.delivery, _hash(request.train))
            trained = yield from self.participant.train(request.train)
            job = Job.model_validate_json(request.train.job)
            coding = party.parameters.coding
            unit = job.privacy.secure_aggregation.weights(job.measures.most_parts)[1]
            by_examples = job.aggregation.weights == "examples"
            weight = -(-trained.examples // unit) if by_examples else 1
            clipped = float(np.mean(np.abs(trained.update) > coding.clip))
            metrics = (trained.loss * weight / coding.max_weight, clipped)
            draw = numpy_generator(
                job.job.seed, "rounding", request.train.round, self.participant.config.name
            )
            return party.mask(trained.update, weight, metrics, draw)

    def evaluate(self, request: MaskedEvaluate) -> MaskedInput:
        """Evaluate, and mask the counts; they are zero at a site without examples."""
        with self._abstaining(), self._resumed(request.session) as party:
            party.accept(request.delivery, _hash(request.evaluate))
            tally = self.participant.tally(request.evaluate)
            counts = tally.counts.astype(np.float64)
            limit = party.parameters.coding.clip
            if counts.max(initial=0.0) > limit:
                raise SiteFailure(
                    "too-many-examples",
                    f"a count is above {limit:,.0f}, the most that a masked sum of "
                    f"{party.parameters.coding.parties:,} sites has room for: the job should lower "
                    "privacy.secure_aggregation.max_sites",
                )
            losses = split_loss(tally.loss, party.parameters.coding)
            return party.mask(counts, 1, losses, None)  # whole numbers: nothing to round

    def confirm(self, ask: ConfirmAsk) -> Confirmation:
        """Sign the list of sites in the masked sum."""
        with self._abstaining(), self._resumed(ask.session) as party:
            return party.confirm(ask.survivors)

    def unmask(self, ask: UnmaskAsk) -> Opening:
        """Reveal one share of each neighbour's secrets, and forget the round."""
        with self._abstaining(), self._resumed(ask.session) as party:
            return party.unmask(ask.request)

    @contextmanager
    def _resumed(self, session: str) -> Iterator[MaskingParty]:
        kept = self.kept
        if kept is None or kept.memory.parameters.session.hex() != session:
            raise SiteFailure("abstained", "no round is under way")
        if time.time() > kept.until:
            raise SiteFailure("abstained", "the round began too long ago")
        policy, memory = self.participant.federation().policy, kept.memory
        mark = kept.round, kept.until
        with self._party(memory.parameters, policy, memory, mark) as party:
            yield party

    @contextmanager
    def _party(
        self,
        parameters: Parameters,
        policy: Policy,
        memory: Memory | None,
        mark: tuple[int, float],
    ) -> Iterator[MaskingParty]:
        """Open the site's masking party; afterwards, keep its memory together with ``mark``."""
        at = self.participant
        federation = at.federation()
        party = MaskingParty(
            site=federation.ids.get(at.config.name, -1),
            identity=load_identity(at.state),
            roster=federation.roster,
            policy=policy,
            parameters=parameters,
            claim=StageLog(at.state / parameters.session.hex() / "claims"),
            pledge=AgreedSums(at.state / "sums"),
            memory=memory,
            threads=torch.get_num_threads(),  # as many as training uses; one in a simulation
        )
        self.kept = None
        try:
            yield party
        except BaseException:
            party.abort()
            raise
        left = party.remember()
        self.kept = Kept(*mark, left) if left else None

    @contextmanager
    def _abstaining(self) -> Iterator[None]:
        """Turn every failure into a code that says nothing about the data."""
        try:
            yield
        except Exception as error:
            self.kept = None
            what = f": {error}" if isinstance(error, SecAggError | SiteFailure) else ""
            log.warning("abstained from a masked round: %s%s", type(error).__name__, what)
            raise SiteFailure(_code(error)) from error  # this site's own people read the cause


def _code(error: Exception) -> str:
    if isinstance(error, SecAggError) and error.culprits:
        return f"blames-{error.culprits[0]}"
    return "terms-refused" if isinstance(error, PolicyRefused | ParameterError) else "abstained"


def _hash(request: TrainRequest | EvaluateRequest) -> bytes:
    if request.adapter.dtype != np.float32:  # other dtypes could differ and have equal hashes
        raise SiteFailure("abstained", "the adapter is not float32")
    return hash_work(describe(request))
