"""Local training: AdamW over the adapter as one flat vector, for one site or for several at once.

The backbone stays in eval mode: its batch-norm statistics must not drift, because they are not
exchanged, and its activations are then the same in every epoch. Dropout acts where something
trains: on the low-rank path and inside the head. It draws from the site's own generator.

If a device's memory does not suffice for a micro-batch, the micro-batch is halved. The result of a
step stays the same, because gradients are added up until the batch is complete.
"""

import logging
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from fedgraft.client.data.batches import is_out_of_memory
from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import open_feed
from fedgraft.client.model.randomness import SiteRows
from fedgraft.client.training.layer_rates import open_pace
from fedgraft.client.training.objective import Batch, PassLoss, per_target
from fedgraft.client.training.sampler import shuffled
from fedgraft.common.config.training import Schedule, Training
from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import Examples, Indices
from fedgraft.common.layout import Layout, Vector

__all__ = [
    "Span",
    "Trained",
    "TrainingTask",
    "Wanted",
    "learning_rate",
    "train",
    "train_alone",
    "train_together",
]

log = logging.getLogger("fedgraft.client")

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """The part of the whole federation's training that is to run: shares from 0 to 1."""

    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class TrainingTask:
    """One site's part of a pass.

    ``start`` is the vector that training starts from, float32 [trained size]. ``generator`` (CPU)
    decides batches and dropout. ``store`` caches the activations of frozen layers.
    """

    examples: Examples
    start: Vector
    generator: torch.Generator
    store: Store | None = None


@dataclass(frozen=True)
class Trained:
    """The result of training: ``vector``, float32 [trained size]; ``loss``, the mean over all
    targets seen, in the objective's unit; ``steps``, the number of optimiser steps."""

    vector: Vector
    loss: float
    steps: int


@dataclass(frozen=True)
class Wanted:
    """A site's request for training: the tensors to train, and the task and settings for it."""

    stack: Stack
    trained: Layout
    task: TrainingTask
    settings: Training
    span: Span


def learning_rate(peak: float, schedule: Schedule, progress: float) -> float:
    """Return the rate at ``progress``, 0..1 of the schedule: linear warm-up, then its shape."""
    if progress < schedule.warmup:
        return peak * max(progress / schedule.warmup, 0.01)
    after = (progress - schedule.warmup) / (1 - schedule.warmup)
    fall = {
        "constant": 1.0,
        "linear": 1 - after,
        "cosine": 0.5 * (1 + math.cos(math.pi * after)),
    }[schedule.shape]
    return peak * (schedule.floor + (1 - schedule.floor) * fall)


def train_alone(
    stack: Stack,
    trained: Layout,
    task: TrainingTask,
    *,
    settings: Training,
    epochs: int | None = None,
    span: Span | None = None,
) -> Trained:
    """Run ``train`` for one site.

    Raises:
        SiteFailure: ``no-examples``, ``loss-not-finite`` or ``out-of-memory``.
    """
    result = train(stack, trained, [task], settings=settings, epochs=epochs, span=span)[0]
    if isinstance(result, SiteFailure):
        raise result
    return result


def train(
    stack: Stack,
    trained: Layout,
    tasks: Sequence[TrainingTask],
    *,
    settings: Training,
    epochs: int | None = None,
    span: Span | None = None,
) -> list[Trained | SiteFailure]:
    """Train the tensors of ``trained`` for every task in one pass; results are in task order.

    Training runs ``epochs`` (default: ``settings.epochs``) in shuffled batches. Adapters are
    float32; with bf16 the frozen backbone computes in bfloat16. FedProx (Li et al. 2020) adds
    ``mu/2 |x - x0|^2``, where ``x0`` is the vector that training started from. A site whose loss is
    not finite fails alone (``loss-not-finite``), and so does one without examples
    (``no-examples``).

    Raises:
        SiteFailure: ``out-of-memory``: memory does not suffice for one row of each site.
    """
    epochs = epochs or settings.epochs
    sites = [_Site(task, settings, epochs) for task in tasks]
    working = sorted((site for site in sites if site.steps), key=lambda site: -site.steps)
    if working:
        _Pass(stack, trained, working, settings, span or Span()).run()
    return [site.result() for site in sites]


def train_together(sites: Sequence[Generator[Wanted, Trained, T]]) -> list[T]:
    """Run each site up to its training request, train the requests together, let each site finish.

    Sites share a pass if they want the same tensors of the same stack trained in the same way. An
    error is thrown into the site, which must turn it into its result.
    """
    results: dict[int, T] = {}
    passes: dict[tuple[object, ...], list[int]] = {}
    wanted: dict[int, Wanted] = {}
    for number, site in enumerate(sites):
        try:
            want = wanted[number] = next(site)
        except StopIteration as done:
            results[number] = done.value
            continue
        alike = (id(want.stack), want.trained.names, want.settings.model_dump_json(), want.span)
        passes.setdefault(alike, []).append(number)
    for members in passes.values():
        first = wanted[members[0]]
        tasks = [wanted[number].task for number in members]
        trained: Sequence[Trained | Exception]
        stack, settings, span = first.stack, first.settings, first.span
        try:
            trained = train(stack, first.trained, tasks, settings=settings, span=span)
        except Exception as error:  # not one site's fault: every site of the pass reports it
            trained = [error] * len(members)
        for number, came in zip(members, trained, strict=True):
            results[number] = _finish(sites[number], came)
    return [results[number] for number in range(len(sites))]


def _finish(site: Generator[Wanted, Trained, T], came: Trained | Exception) -> T:
    try:
        if isinstance(came, Exception):
            site.throw(came)
        else:
            site.send(came)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("a site wants to train twice for one answer")


@dataclass
class _Site:
    """A task in training."""

    task: TrainingTask
    settings: Training
    epochs: int
    vector: Vector | None = None
    loss: float = 0.0  # the mean over all targets seen
    batches: Iterator[Indices] = field(init=False)
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        size = self.settings.batch_size
        self.steps = self.epochs * math.ceil(len(self.task.examples) / size)
        task, settings = self.task, self.settings
        self.batches = shuffled(task.examples, task.generator, self.epochs, settings)

    def result(self) -> Trained | SiteFailure:
        if self.vector is None:
            return SiteFailure("no-examples")
        if not math.isfinite(self.loss) or not np.isfinite(self.vector).all():
            return SiteFailure("loss-not-finite")
        return Trained(self.vector, self.loss, self.steps)


class _Pass:
    """The steps of several sites side by side; a site with fewer steps leaves earlier.

    One flat tensor holds all adapters, and each row of it is one parameter of the optimiser. A
    step over a small adapter then spends its time on arithmetic, not on kernel launches.
    """

    def __init__(
        self, stack: Stack, trained: Layout, sites: list[_Site], settings: Training, span: Span
    ) -> None:
        self.stack, self.trained, self.settings, self.span = stack, trained, settings, span
        self.sites = sites  # sites with the most steps come first
        starts = np.stack([site.task.start for site in sites])
        self.flat = torch.from_numpy(starts).to(stack.device, copy=True)
        self.gradient = torch.zeros_like(self.flat)
        self.pace = open_pace(stack, trained, settings)
        every = [site.task.examples for site in sites]
        self.objective = PassLoss(stack, trained, settings, every, self.flat)
        varied = self.objective.vary is not None
        self.feeds = [
            open_feed(stack, trained, site.task.examples, site.task.store, varied=varied)
            for site in sites
        ]
        self.rows = [nn.Parameter(row) for row in self.flat]
        for row, gradient in zip(self.rows, self.gradient, strict=True):
            row.grad = gradient
        self.optimizer = torch.optim.AdamW(
            [{"params": [row]} for row in self.rows],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.total = torch.zeros(len(sites), device=stack.device)  # of the losses
        self.targets = torch.zeros_like(self.total)  # seen so far
        self.batch_targets = torch.zeros_like(self.total)  # of the batches of this step
        self.progress: list[float] = []  # of each site: 0 to 1 of the whole federation
        self.views: list[torch.Tensor] = []  # of the flat tensor; the stack computes with them
        self.micro = settings.batch_size // settings.accumulation  # rows of a site in a micro-batch

    def run(self) -> None:
        """Run all steps of all sites; leave the vector and the summed loss in each site."""
        active = 0
        try:
            for step in range(self.sites[0].steps):
                still = sum(site.steps > step for site in self.sites)
                if still != active:
                    self._finish(still, active)
                    active = still
                    self.views = self.stack.put(self.trained, self.flat[:active])
                    for view in self.views:
                        view.requires_grad_(True)
                self._step(step, active)
            self._finish(0, active)
        finally:
            self.stack.randomness.rows = ()  # nothing is random after training

    def _step(self, step: int, active: int) -> None:
        self.gradient.zero_()
        self.batch_targets.zero_()
        batches = [next(site.batches) for site in self.sites[:active]]
        length = self.span.end - self.span.start
        within = [step / site.steps for site in self.sites[:active]]
        self.progress = [self.span.start + length * share for share in within]
        done, longest = 0, max(len(batch) for batch in batches)
        while done < longest:
            rows = self.micro
            if self._fits(batches, slice(done, done + rows)):
                done += rows
        gradient, sizes = self.gradient[:active], [len(batch) for batch in batches]
        gradient.mul_(per_target(sizes, self.batch_targets[:active])[:, None])
        self.targets += self.batch_targets
        self.objective.pull(gradient, self.flat[:active])
        rates = None if self.pace is None else self.pace.at(self.progress).to(self.flat.device)
        if self.settings.clip_norm:
            moving = gradient if rates is None else gradient * (rates > 0)
            norms = moving.norm(dim=1, keepdim=True)
            gradient.mul_((self.settings.clip_norm / (norms + 1e-6)).clamp(max=1.0))
        schedule = self.settings.schedule
        places = within if schedule.over == "round" else self.progress
        for at, group in zip(places, self.optimizer.param_groups, strict=False):
            group["lr"] = learning_rate(self.settings.learning_rate, schedule, at)
        self._move(active, rates)

    def _move(self, active: int, rates: torch.Tensor | None) -> None:
        """Take an optimiser step; ``rates`` [active, values]: the share of the step by which each
        value moves.

        AdamW keeps gradient moments also for a value whose rate is still 0. So this value starts
        without a jump later.
        """
        flat = self.flat[:active]
        before = None if rates is None else flat.clone()
        self.optimizer.step()
        if before is not None and rates is not None:
            flat.copy_(torch.lerp(before, flat, rates))

    def _fits(self, batches: Sequence[Indices], part: slice) -> bool:
        """Return whether memory sufficed for ``_backward``; if not, halve the rows from now on.

        If memory does not suffice, nothing else changes.

        Raises:
            SiteFailure: ``out-of-memory``: one row of each site cannot be halved.
        """
        generators = [site.task.generator for site in self.sites[: len(batches)]]
        drawn = [generator.get_state() for generator in generators]
        try:
            self._backward(batches, part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # the error holds tensors: they are freed only after this block
        else:
            return True
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)
        if self.micro == 1:
            raise SiteFailure("out-of-memory")
        self.micro //= 2
        log.warning("out of memory: %d rows at a time from now on", self.micro)
        if self.stack.device.type == "cuda":
            torch.cuda.empty_cache()  # cached blocks have the old, useless size
        return False

    def _backward(self, batches: Sequence[Indices], part: slice) -> None:
        """Add the gradient of one micro-batch, [sites x rows]; padding rows have weight zero."""
        parts = [batch[part] for batch in batches]
        rows = max(len(index) for index in parts)
        # A site with fewer rows repeats its own rows: another site's might not be finite.
        padded = [
            np.resize(index if len(index) else batch, rows)
            for index, batch in zip(parts, batches, strict=True)
        ]
        feeds = self.feeds[: len(batches)]
        width = max(feed.width(index) for feed, index in zip(feeds, padded, strict=True))
        randomness = self.stack.randomness
        randomness.width, randomness.head = width, self.settings.dropout
        randomness.rows = tuple(
            SiteRows(len(index), feed.width(index), feed.left, site.task.generator)
            for index, feed, site in zip(parts, feeds, self.sites, strict=False)
        )
        sizes = [len(batch) for batch in batches]
        batch = Batch(feeds, padded, parts, sizes, width, self.progress)
        value = self.objective.of(batch, self.views)
        # The output of a model may not depend on some layers: these stay unchanged.
        gradients = torch.autograd.grad(value.minimised, self.views, allow_unused=True)
        flat = [g if g is None else g.reshape(len(batches), -1) for g in gradients]
        # Nothing below allocates memory: a micro-batch is added completely or not at all.
        for where, gradient in zip(self.trained.slices.values(), flat, strict=True):
            if gradient is not None:
                self.gradient[: len(batches), where].add_(gradient)
        self.total[: len(batches)] += value.summed.detach()
        self.batch_targets[: len(batches)] += value.targets
        self.objective.take(value, batch)

    def _finish(self, still: int, active: int) -> None:
        """Take the results of the sites from ``still`` up to ``active``, which have no more steps.

        Their rows stay in the optimiser without a gradient, so it skips them.
        """
        for number in range(still, active):
            site, vector = self.sites[number], self.flat[number].cpu().numpy().copy()
            self.objective.finish(number, vector, self.feeds[number], site.task.generator)
            site.vector = vector
            site.loss = float(self.total[number]) / max(float(self.targets[number]), 1.0)
            self.rows[number].grad = None
