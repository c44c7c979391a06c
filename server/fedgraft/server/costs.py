"""What a job will cost before anything trains: parameters, bytes on the wire, memory."""

from dataclasses import dataclass

import numpy as np
import torch

from fedgraft.common.job import Job
from fedgraft.common.messages import encode, wire_bytes
from fedgraft.common.metrics import Tally
from fedgraft.common.payloads import EvaluateReply, EvaluateRequest, TrainReply, TrainRequest
from fedgraft.common.processors import ImageProcessor
from fedgraft.common.workbench import Workbench
from fedgraft.server.rounds import Plan

__all__ = ["Costs", "estimate_costs"]

VECTORS = 6  # adapter, gradient, two moments, received adapter, update
OVERHEAD_MB = 350  # Python with torch and transformers loaded, measured


@dataclass(frozen=True)
class Costs:
    """One site's costs; bytes are of one round with its evaluation, memory is an estimate in MB.

    ``activations_mb`` is what a backward pass over one micro-batch keeps, counted on one example
    of full length.
    """

    trained_parameters: int
    exchanged_parameters: int
    total_parameters: int
    bytes_up: int
    bytes_down: int
    weights_mb: float
    activations_mb: float

    @property
    def memory_mb(self) -> float:
        """Estimated memory of a site's process."""
        vectors = VECTORS * 4 * self.trained_parameters / 2**20
        return OVERHEAD_MB + self.weights_mb + vectors + self.activations_mb


def estimate_costs(plan: Plan, bench: Workbench) -> Costs:
    """Costs of the plan at one site: messages are built and counted, one example is passed."""
    job, size, names = plan.job, plan.exchanged.size, plan.exchanged.names
    adapter = np.zeros(size, np.float32)
    text = plan.request.job
    tally = Tally.empty(len(job.job.labels)).to_vector()
    down = [TrainRequest(plan.session, 1, text, names, adapter)]
    up = [TrainReply(plan.session, 1, plan.exchanged.fingerprint, 1, 0.0, adapter)]
    messages_down = [encode(message) for message in down]
    messages_up = [encode(message) for message in up]
    if job.data.validation:
        evaluate = EvaluateRequest(plan.session, 1, text, names, "validation", adapter)
        messages_down.append(encode(evaluate))
        messages_up.append(encode(EvaluateReply(plan.session, 1, tally)))
    return Costs(
        trained_parameters=size + bench.local.size,
        exchanged_parameters=size,
        total_parameters=bench.backbone_parameters,
        bytes_up=sum(wire_bytes(message) for message in messages_up),
        bytes_down=sum(wire_bytes(message) for message in messages_down),
        weights_mb=4 * bench.backbone_parameters / 2**20,
        activations_mb=_activations_mb(job, bench),
    )


def _activations_mb(job: Job, bench: Workbench) -> float:
    """Bytes that autograd keeps for one example, times the micro-batch."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    processor = bench.processor
    if isinstance(processor, ImageProcessor):
        height, width = processor.size
        inputs = {"pixel_values": torch.zeros(1, processor.channels, height, width)}
    else:
        length = min(job.data.max_length, processor.limit or job.data.max_length)
        ids = torch.full((1, length), processor.pad_id)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = {p.untyped_storage().data_ptr() for p in bench.model.parameters()}
    bench.model.requires_grad_(False)
    for name, parameter in bench.model.named_parameters():
        parameter.requires_grad_(name in bench.layout.slices)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bench.model(**inputs)
    size = sum(count for pointer, count in kept.items() if pointer not in parameters)
    return size * (job.training.batch_size // job.training.accumulation) / 2**20
