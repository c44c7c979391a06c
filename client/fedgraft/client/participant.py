"""A site in this process: its data, the job's workbench, and its state between rounds.

A participant can answer any request after a restart, because nothing of a run is in memory only:
local heads are on the site's own disk, one file per round.
"""

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import load_file, save_file

from fedgraft.client.data.cache import Store, open_store
from fedgraft.client.data.splits import Splits
from fedgraft.client.membership.backbone_fetch import ensure_backbone
from fedgraft.client.membership.identity import load_identity
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.policy.disclosure import estimate_disclosure
from fedgraft.client.policy.guard import SESSION, Guard
from fedgraft.client.site_config import SiteConfig, load_site
from fedgraft.client.training.evaluate import measure
from fedgraft.client.training.trainer import Span, Trained, TrainingTask, Wanted
from fedgraft.common.adapters.model import Workbench, cache_folder, choose_device, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import count_documents
from fedgraft.common.federation.federation_file import Federation, load_federation
from fedgraft.common.files import write_atomically
from fedgraft.common.layout import Layout, Vector, cut_rank
from fedgraft.common.messages.payloads import (
    EvaluateReply,
    EvaluateRequest,
    PlanReply,
    PlanRequest,
    TrainReply,
    TrainRequest,
)
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.section import Cache
from fedgraft.common.seeds import torch_generator

__all__ = ["Participant", "open_participant"]

FIRST = "first.safetensors"  # in a session's folder
# The coordinator keeps two checkpoints. So it may go back two rounds and train from there again.
KEPT_STATES = 3


class Participant:
    """Answers the coordinator's requests for one site."""

    def __init__(self, config: SiteConfig, state: Path) -> None:
        self.config = config
        self.state = state
        self.guard = Guard(Path(config.policy), state) if config.policy else None
        self.device = str(choose_device(config.device))
        cache = config.cache
        self.store: Store = open_store(cache_folder() / "encoded", cache.memory, cache.disk)
        self._splits: dict[str, Splits] = {}

    def agree(self, request: PlanRequest) -> PlanReply:
        """Check that this site has the same backbone and adapter, and data for the job.

        Raises:
            SiteFailure: ``backbone-differs``, ``layout-differs``, ``fixed-differs``,
                ``no-examples``, ``no-labels``, or a code of ``check_privacy`` or of
                ``Guard.consent``. If updates are masked, ``not-eligible`` for too few or too many
                examples.
        """
        ensure_backbone(Job.model_validate_json(request.job), self.state)
        job, bench = self.open(request.session, request.job)
        self.check_privacy(job)
        if not self.config.data.labelled and job.training.domain is None:
            raise SiteFailure("no-labels")
        if bench.backbone.fingerprint != request.backbone:
            raise SiteFailure("backbone-differs")
        if bench.layout.only(request.names).fingerprint != request.layout:
            raise SiteFailure("layout-differs")
        if bench.fixed_hash({*request.names, *bench.local.names}) != request.fixed:
            raise SiteFailure("fixed-differs")
        splits, masked = self.splits(job), job.privacy.secure_aggregation
        targets = splits.train.target_count
        len(splits.test)  # reading it now shows errors in the file now
        most, unit = masked.weights(job.measures.most_parts)
        too_many = job.aggregation.weights == "examples" and targets > most * unit
        if masked.enabled and (not targets or too_many):
            told = f"not-eligible: {targets:,} to train on, and a masked sum has room for 1 to "
            raise SiteFailure("not-eligible", f"{told}{most * unit:,}")  # the code hides which
        if not targets:
            raise SiteFailure("no-examples")
        if self.guard is not None:
            sites = len(self.federation().sites) if masked.enabled else 1
            leaving = estimate_disclosure(job, bench.layout.only(request.names), sites)
            counts = len(splits.train), count_documents(splits.train)
            self.guard.consent(request, job, leaving, *counts)
        return PlanReply(request.session, self.config.name)

    def check_privacy(self, job: Job) -> None:
        """Check that the job masks updates if this site requires it, and that this site can mask.

        Raises:
            SiteFailure: ``secure-aggregation-required`` if the job asks for updates in clear and
                this site sends them only masked; ``no-federation`` or ``not-in-roster``.
        """
        masked = job.privacy.secure_aggregation.enabled
        if self.masks_only and not masked:
            raise SiteFailure("secure-aggregation-required")
        if masked:
            key = self.federation().sites.get(self.config.name)
            if key != load_identity(self.state).public.hex():
                raise SiteFailure("not-in-roster")

    @property
    def masks_only(self) -> bool:
        """Whether updates leave only masked: the policy decides, else yes in every federation."""
        if self.guard is not None:
            return self.guard.policy.privacy.secure_aggregation == "required"
        return self.config.federation is not None

    def federation(self) -> Federation:
        """Return the federation that this site is in, from its own file.

        Raises:
            SiteFailure: ``no-federation``.
        """
        if self.config.federation is None:
            raise SiteFailure("no-federation")
        return load_federation(Path(self.config.federation))

    def check_clear(self, request: TrainRequest | EvaluateRequest) -> None:
        """Check that the reply may go in clear.

        Raises:
            SiteFailure: ``secure-aggregation-required``.
        """
        job = self.open(request.session, request.job, request.round)[0]
        if self.masks_only or job.privacy.secure_aggregation.enabled:
            raise SiteFailure("secure-aggregation-required")

    def train(self, request: TrainRequest) -> Generator[Wanted, Trained, TrainReply]:
        """Run one round of local training from the request's adapter.

        This is a generator: it yields its training request and is sent the result. So several
        sites of one process can be trained in one pass (``training.train_together``).

        Raises:
            SiteFailure: ``no-examples``, the loss is not finite, or a code of ``Guard.check_work``
                or ``Guard.check_amount``: what the site agreed to no longer holds.
        """
        job = self.open(request.session, request.job, request.round)[0]
        examples, stack = self.splits(job).train, self.stack(job)
        bench = self.agreed(request.session, job, stack)
        if self.guard is not None:
            self.guard.check_amount(job, len(examples), count_documents(examples))
        exchanged = bench.layout.only(request.names)
        trained = bench.layout.only((*exchanged.names, *bench.local.names))
        if job.start is not None and request.round == 1:
            self._keep_first(request)
        start = self.start(bench, trained, request)
        rounds = job.rounds.count
        again = (request.attempt,) if request.attempt else ()
        draw = ("train", request.round, self.config.name, *again)
        result = yield Wanted(
            stack,
            trained,
            TrainingTask(examples, start, torch_generator(job.job.seed, *draw), self.store),
            job.training,
            Span((request.round - 1) / rounds, request.round / rounds),
        )
        self._keep_own(request, trained.part(result.vector, bench.local))
        update = trained.part(result.vector - start, exchanged)
        return TrainReply(
            session=request.session,
            round=request.round,
            layout=exchanged.fingerprint,
            examples=examples.target_count,
            loss=result.loss,
            update=update,
        )

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Return the tally of the request's adapter in clear, without counts of small groups.

        Raises:
            SiteFailure: ``no-examples``: that split has none.
        """
        tally = self.tally(request)
        if not tally.examples:
            raise SiteFailure("no-examples")
        measures = self.open(request.session, request.job, request.round)[0].measures
        tally = replace(tally, more=measures.without_few(tally.more))
        return EvaluateReply(request.session, request.round, tally.to_vector())

    def tally(self, request: EvaluateRequest) -> Tally:
        """Evaluate the request's adapter together with the parts that stay at this site."""
        job = self.open(request.session, request.job, request.round)[0]
        splits, measures = self.splits(job), job.measures
        if request.split not in ("validation", "test"):
            return Tally.empty(measures)
        examples = getattr(splits, request.split)  # alone: another file may not be read yet
        if not examples:
            return Tally.empty(measures)
        stack = self.stack(job)
        bench = self.agreed(request.session, job, stack)
        trained = bench.layout.only((*request.names, *bench.local.names))
        vector = self.start(bench, trained, request)
        return measure(stack, trained, vector, examples, measures=measures, store=self.store).tally

    def agreed(self, session: str, job: Job, stack: Stack) -> Workbench:
        """Return the workbench of ``stack``, if the site agreed to a round with this backbone.

        Call it when examples and stack are at hand: all of it must be of the same files.

        Raises:
            SiteFailure: ``backbone-differs``, or a code of ``Guard.check_work``.
        """
        bench = open_workbench(job)
        if bench is not stack.bench:  # replaced a moment ago
            raise SiteFailure("backbone-differs")
        if self.guard is not None:
            self.guard.check_work(session, job, bench.backbone.fingerprint)
        return bench

    def splits(self, job: Job) -> Splits:
        """Return this site's examples for the job.

        Reading them raises DataError if the site's files do not match the job's schema.
        """
        return self._splits.setdefault(job.model_dump_json(), Splits(self.config, job, self.store))

    def stack(self, job: Job) -> Stack:
        """Return the stack that computes here for the job."""
        return open_stack(job, device=self.device)

    def start(
        self, bench: Workbench, trained: Layout, request: TrainRequest | EvaluateRequest
    ) -> Vector:
        """Return the coordinator's tensors together with the site's own head or factors, if any.

        The vector is float32 [trained.size], cut to this site's rank.
        """
        # Training in round t starts from the own parts of the last round before t. Evaluation after
        # round t uses the own parts of round t.
        before = request.round - (1 if isinstance(request, TrainRequest) else 0)
        own = self._own_parts(request.session, before) if bench.local.names else None
        vector = trained.merged(
            bench.initial_of(trained),
            *([(bench.local, own)] if own is not None else []),
            (bench.layout.only(request.names), request.adapter),
        )
        return vector if self.config.rank is None else cut_rank(trained, vector, self.config.rank)

    def first_adapter(self, session: str) -> Vector | None:
        """Return the adapter of round 1, if the job continues an earlier adapter.

        Return None if this site did not take part in round 1.
        """
        path = self.state / session / FIRST
        return load_file(path)["adapter"] if path.exists() else None

    def open(self, session: str, job: str, number: int = 1) -> tuple[Job, Workbench]:
        """Return the job of a request, and the workbench for it.

        Raises:
            SiteFailure: ``bad-session`` or ``bad-round``.
        """
        if not SESSION.fullmatch(session):  # it becomes the name of a folder here
            raise SiteFailure("bad-session")
        if number < 1:
            raise SiteFailure("bad-round")
        loaded = Job.model_validate_json(job)
        return loaded, open_workbench(loaded)

    def _own_parts(self, session: str, last: int) -> Vector | None:
        """Return the own parts of the newest round up to ``last``; None before the first round.

        Raises:
            SiteFailure: ``head-lost``: only the own parts of newer rounds are left.
        """
        kept = self._kept(session)
        rounds = [path for path in kept if int(path.stem) <= last]
        if len(kept) == KEPT_STATES and not rounds:
            raise SiteFailure("head-lost")
        return load_file(rounds[-1])["head"] if rounds else None

    def _keep_first(self, request: TrainRequest) -> None:
        path = self.state / request.session / FIRST
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, lambda temporary: save_file({"adapter": request.adapter}, temporary))

    def _keep_own(self, request: TrainRequest, head: Vector) -> None:
        if not head.size:
            return
        path = self.state / request.session / f"{request.round:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, lambda temporary: save_file({"head": head}, temporary))
        for old in self._kept(request.session)[:-KEPT_STATES]:
            old.unlink()

    def _kept(self, session: str) -> list[Path]:
        return sorted((self.state / session).glob("[0-9]*.safetensors"))


def open_participant(node_config: Mapping[str, object]) -> Participant:
    """Return the participant that a Flower node's configuration names.

    ``site`` is the path of its ``site.toml``. ``state``, ``device``, ``federation``, ``teacher``,
    ``rank`` and ``cache`` (JSON) may override the values in that file. ``unlabelled`` says that
    labels are not read.
    """
    config = load_site(Path(str(node_config["site"])))
    if node_config.get("unlabelled"):
        data = config.data.model_copy(update={"labelled": False})
        config = config.model_copy(update={"data": data})
    for key in ("device", "federation", "teacher"):
        if value := node_config.get(key):
            config = config.model_copy(update={key: str(value)})
    if rank := node_config.get("rank"):
        config = config.model_copy(update={"rank": int(str(rank))})
    if cache := node_config.get("cache"):
        config = config.model_copy(update={"cache": Cache.model_validate_json(str(cache))})
    return Participant(config, Path(str(node_config.get("state") or config.state)))
