"""The costs of a job, estimated before training: parameters, bytes sent, memory."""

from dataclasses import dataclass

import numpy as np
import torch

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError, first_line
from fedgraft.common.examples import AT_ONCE, OUTPUTS
from fedgraft.common.messages.codec import encode, wire_bytes
from fedgraft.common.messages.dry_run import blank_replies
from fedgraft.common.messages.masked_terms import describe
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
from fedgraft.common.privacy import FEWEST
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    Envelope,
    KeysRequest,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.server.plan import Plan

__all__ = ["Costs", "estimate_costs"]

VECTORS = 6  # adapter, gradient, two moments, received adapter, update
OVERHEAD_MB = 350  # Python with torch and transformers loaded, measured
COPIES = 2  # at the peak, of the outputs that have a target: their log-softmax, and its gradient


@dataclass(frozen=True)
class Costs:
    """One site's costs; bytes are of one round with its evaluation, memory is an estimate in MB.

    ``activations_mb`` is the memory that a training step takes beside weights and adapter: the
    tensors that autograd keeps for one micro-batch, its outputs, and what the loss makes of these.
    ``evaluation_mb`` is that of a pass of the evaluation. Both are counted on one example of full
    length in float32. They are within a factor of two of what a site takes.
    """

    trained_parameters: int
    exchanged_parameters: int
    total_parameters: int
    bytes_up: int
    bytes_down: int
    weights_mb: float
    activations_mb: float
    evaluation_mb: float

    @property
    def memory_mb(self) -> float:
        """The estimated memory of a site's process, MB."""
        values = max(self.trained_parameters, self.exchanged_parameters)
        vectors = VECTORS * 4 * values / 2**20
        passes = max(self.activations_mb, self.evaluation_mb)
        return OVERHEAD_MB + self.weights_mb + vectors + passes


def estimate_costs(plan: Plan, bench: Workbench) -> Costs:
    """Return the costs of the plan at one site, from real messages and a pass of one example."""
    job, size = plan.job, plan.exchanged.size
    kept, outputs, widest = _measured(job, bench)
    hidden = job.task.hidden_share and (job.settings.masked or job.task.hidden_share)
    compared = hidden or 1.0  # the share of outputs that have a target
    around_loss = outputs * (1 + COPIES * compared)
    micro = job.training.batch_size // job.training.accumulation
    at_once = max(1, min(AT_ONCE, 4 * OUTPUTS // outputs))
    up = blank_replies(job, plan.exchanged, _cohort(job))
    return Costs(
        trained_parameters=plan.exchanged.of_model.size + bench.local.size,
        exchanged_parameters=size,
        total_parameters=bench.backbone_parameters,
        bytes_up=sum(wire_bytes(encode(message)) for message in up),
        bytes_down=sum(wire_bytes(encode(message)) for message in _messages_down(plan)),
        weights_mb=4 * bench.backbone_parameters / 2**20,
        activations_mb=micro * (kept + around_loss) / 2**20,
        evaluation_mb=at_once * (widest + around_loss) / 2**20,
    )


def _requests(plan: Plan) -> list[TrainRequest | EvaluateRequest]:
    """Return the requests of a round: to train and, if there is validation, to evaluate."""
    adapter = np.zeros(plan.exchanged.size, np.float32)
    session, job, names = plan.session, plan.request.job, plan.exchanged.names
    asked: list[TrainRequest | EvaluateRequest]
    asked = [TrainRequest(session, 1, 0, job, names, adapter)]
    if plan.job.data.validation:
        asked.append(EvaluateRequest(session, 1, job, names, "validation", adapter))
    return asked


def _messages_down(plan: Plan) -> list[Request]:
    """Return the messages that one site gets in a round."""
    works = _requests(plan)
    if not plan.job.privacy.secure_aggregation.enabled:
        return list(works)
    return [message for work in works for message in _masked_stages(plan, work)]


def _masked_stages(plan: Plan, work: TrainRequest | EvaluateRequest) -> list[Request]:
    job, session, digest = plan.job, plan.session, bytes(32)
    cohort = tuple(range(_cohort(job)))
    numbers = job.privacy.secure_aggregation.plan(len(cohort))
    keys = KeysRequest(1, digest, digest)
    advertised = tuple(Advertisement(s, digest, digest, digest, bytes(64)) for s in cohort)
    delivery = Delivery(
        tuple(Envelope(0, other, bytes(80)) for other in cohort[1 : numbers.degree + 1])
    )
    signed = tuple(Confirmation(site, bytes(64)) for site in cohort)
    if isinstance(work, TrainRequest):
        task: Request = MaskedTrain(work, delivery)
    else:
        task = MaskedEvaluate(work, delivery)
    return [
        KeysAsk(session, describe(work), cohort, keys),
        SharesAsk(session, SharesRequest(advertised)),
        task,
        ConfirmAsk(session, Survivors(cohort, cohort, tuple(said.signature for said in signed))),
        UnmaskAsk(session, UnmaskRequest(signed[: numbers.sign_threshold])),
    ]


def _cohort(job: Job) -> int:
    """Return the number of sites of a round, if the job gives it; else the fewest it accepts."""
    if job.rounds.cohort is not None:
        return job.rounds.cohort
    if job.simulation is not None and job.simulation.sites is not None:
        return job.rounds.cohort_size(job.simulation.sites)
    return max(job.rounds.min_sites, FEWEST)


def _measured(job: Job, bench: Workbench) -> tuple[int, int, int]:
    """Return bytes of one example: what autograd keeps, the outputs, and the widest layer.

    The example is as long as examples of the job can be.

    Without autograd only a layer's tensors are in memory at a time. They are taken to be the four
    largest of those that autograd would keep.

    Raises:
        BackboneError: the backbone cannot compute the example, or its answer is no number.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    blank = job.task.blank(bench.processor, job.settings)
    inputs = {name: torch.from_numpy(array) for name, array in blank.items()}
    parameters = {p.untyped_storage().data_ptr() for p in bench.model.parameters()}
    bench.model.requires_grad_(False)
    for name, parameter in bench.model.named_parameters():
        parameter.requires_grad_(name in bench.layout.slices)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = bench.model(**inputs)
    except Exception as error:  # models raise many kinds of error, each at its own layer
        raise BackboneError(
            f"{bench.backbone.source} cannot compute one example of this job "
            f"({type(error).__name__}: {first_line(error)})",
            hint="a smaller data.max_length, if texts are read; do its tokenizer or image settings "
            "and its weights belong together?",
        ) from None
    if not all(bool(one.isfinite().all()) for one in output.values()
               if isinstance(one, torch.Tensor) and one.is_floating_point()):  # fmt: skip
        raise BackboneError(
            f"{bench.backbone.source} answers with NaN or infinity to one example of this job",
            hint="its weights or its statistics are damaged: fetch it again",
        )
    sizes = [count for pointer, count in kept.items() if pointer not in parameters]
    outputs = max(value.nbytes for value in output.values() if isinstance(value, torch.Tensor))
    return sum(sizes), outputs, sum(sorted(sizes)[-4:])
