"""One site's local training: AdamW over the adapter as one flat vector.

The backbone stays in eval mode: its batch-norm statistics must not drift (they are not exchanged)
and its activations are then the same every epoch. Dropout acts where something trains: on the
low-rank path and inside the head, from a generator of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from fedgraft.client.data import Examples
from fedgraft.common.errors import SiteFailure
from fedgraft.common.job import Schedule, Training

__all__ = ["Span", "TrainingResult", "learning_rate", "train"]


BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Span:
    """Which part of the whole federation's training this is: shares from 0 to 1."""

    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class TrainingResult:
    """``loss``: mean over all examples seen, in nats; ``steps``: optimiser steps taken."""

    loss: float
    steps: int


def learning_rate(peak: float, schedule: Schedule, progress: float) -> float:
    """The rate at ``progress`` (0..1 of the whole federation): linear warm-up, then the shape."""
    if progress < schedule.warmup:
        return peak * max(progress / schedule.warmup, 0.01)
    after = (progress - schedule.warmup) / (1 - schedule.warmup)
    fall = {
        "constant": 1.0,
        "linear": 1 - after,
        "cosine": 0.5 * (1 + math.cos(math.pi * after)),
    }[schedule.shape]
    return peak * (schedule.floor + (1 - schedule.floor) * fall)


def train(
    model: PeftModel,
    names: tuple[str, ...],
    examples: Examples,
    *,
    settings: Training,
    generator: torch.Generator,
    epochs: int | None = None,
    span: Span | None = None,
) -> TrainingResult:
    """Train the named parameters of ``model`` in place on ``examples``; all others stay frozen.

    Runs ``epochs`` (default: the settings') in shuffled batches. Weights are fp32; with bf16 the
    forward pass runs under autocast. ``generator`` (CPU) decides batches and dropout. FedProx
    (Li et al. 2020) adds ``mu/2 |x - x0|^2`` where ``x0`` is what training started from.

    Raises:
        SiteFailure: ``no-examples``, or ``loss-not-finite`` when the loss is NaN or infinite.
    """
    if not len(examples):
        raise SiteFailure("no-examples")
    epochs, span = epochs or settings.epochs, span or Span()
    device = next(model.parameters()).device
    flat, gradient = _bind(model, names)
    anchor = flat.detach().clone()
    _set_modes(model, settings.dropout, generator)
    optimizer = torch.optim.AdamW(
        [flat], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    labels = torch.from_numpy(examples.labels)
    steps = epochs * math.ceil(len(examples) / settings.batch_size)
    total, seen = torch.zeros((), device=device), 0
    for step, batch in enumerate(_batches(len(examples), epochs, settings.batch_size, generator)):
        gradient.zero_()
        for part in torch.split(batch, settings.batch_size // settings.accumulation):
            loss = _loss(model, examples, labels, part, settings, device)
            torch.autograd.backward(loss / len(batch))
            total += loss.detach()
        if settings.proximal:
            gradient.add_(flat.detach() - anchor, alpha=settings.proximal)
        if settings.clip_norm:
            gradient.mul_((settings.clip_norm / (gradient.norm() + 1e-6)).clamp(max=1.0))
        at = span.start + (span.end - span.start) * step / steps
        rate = learning_rate(settings.learning_rate, settings.schedule, at)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        seen += len(batch)
    model.eval()
    mean = float(total) / seen
    if not math.isfinite(mean) or not bool(torch.isfinite(flat).all()):
        raise SiteFailure("loss-not-finite")
    return TrainingResult(mean, steps)


def _loss(
    model: PeftModel,
    examples: Examples,
    labels: torch.Tensor,
    index: torch.Tensor,
    settings: Training,
    device: torch.device,
) -> torch.Tensor:
    """Summed cross entropy (nats) of the examples at ``index``."""
    inputs = {key: value.to(device) for key, value in examples.batch(index.numpy()).items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        logits = model(**inputs).logits
    return functional.cross_entropy(logits.float(), labels[index].to(device), reduction="sum")


def _batches(
    count: int, epochs: int, size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count, generator=generator), size)


def _bind(model: PeftModel, names: tuple[str, ...]) -> tuple[nn.Parameter, torch.Tensor]:
    """Lay the named parameters and their gradients into two flat tensors, of which they are views.

    One optimiser tensor instead of dozens: a step over a small adapter is then arithmetic, not
    kernel launches.
    """
    wanted = set(names)
    parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
        if name in wanted:
            parameters.append(parameter)
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    gradient = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        here = slice(start, start + parameter.numel())
        parameter.data = flat[here].view(parameter.shape)
        parameter.grad = gradient[here].view(parameter.shape)
        start = here.stop
    whole = nn.Parameter(flat)
    whole.grad = gradient
    return whole, gradient


class _Dropout(nn.Module):
    """Dropout that draws from its own generator instead of the process-global one."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self.generator = probability, generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero each element with the probability and scale the rest up, in training only."""
        if not self.training or not self.p:
            return x
        keep = torch.rand(x.shape, generator=self.generator).to(x.device) >= self.p
        return x * keep / (1 - self.p)


def _set_modes(model: PeftModel, head_dropout: float, generator: torch.Generator) -> None:
    """Eval everywhere but in the head and on the low-rank path; seeded dropout in both."""
    model.eval()
    base = model.get_base_model()
    for name, child in base.named_children():
        if name != getattr(base, "base_model_prefix", ""):
            child.train()
            _seed_dropout(base, name, head_dropout, generator)
            for module in child.modules():
                if isinstance(module, BATCH_NORM):  # its statistics are no parameters: they stay
                    module.eval()
    for module in base.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()
            for name, dropout in module.lora_dropout.items():
                probability = float(getattr(dropout, "p", 0.0))
                _seed_dropout(module.lora_dropout, name, probability, generator)


def _seed_dropout(
    parent: nn.Module, name: str, probability: float, generator: torch.Generator
) -> None:
    """Put seeded dropout in the place of every dropout at or below ``parent.name``."""
    child = getattr(parent, name) if not isinstance(parent, nn.ModuleDict) else parent[name]
    if isinstance(child, nn.Dropout | _Dropout):
        parent.add_module(name, _Dropout(probability, generator).train())
        return
    for below, _ in list(child.named_children()):
        _seed_dropout(child, below, probability, generator)
