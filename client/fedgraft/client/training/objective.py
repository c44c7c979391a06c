"""The training objective of a pass: each site's loss from labels, a teacher and other domains."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedgraft.client.data.batches import Inputs, as_tensors
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import (
    Feed,
    VaryFeed,
    predict,
    teacher_logits_of,
)
from fedgraft.client.model.randomness import SiteRows
from fedgraft.client.objectives import Losses, distances, restrict
from fedgraft.client.training.augmentation import Vary, open_augmentation
from fedgraft.client.training.domain_adaptation import Alignment, Statistics, watch_features
from fedgraft.client.training.ewc import Consolidation, fisher_information
from fedgraft.common.config.training import Training
from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import Examples, Indices
from fedgraft.common.layout import Layout, Vector
from fedgraft.common.tasks.base import Corrupt

__all__ = ["Batch", "PassLoss", "Value", "per_target"]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of every site, padded to ``width`` tokens.

    ``padded`` has the same number of rows for each feed. The ``real`` rows come first among them;
    the others have weight zero. ``sizes`` are the numbers of rows of the whole batches.
    ``progress`` is each site's share of the federation's training, 0 to 1.
    """

    feeds: Sequence[Feed]
    padded: Sequence[Indices]
    real: Sequence[Indices]
    sizes: Sequence[int]
    width: int
    progress: Sequence[float]


@dataclass(frozen=True)
class Value:
    """The objective's value for one micro-batch.

    ``summed`` [sites] is the summed loss of the real rows, and ``targets`` [sites] is the number
    of their targets. Gradients are taken of ``minimised``: sums divided by the rows of the whole
    batches. How many targets a whole batch has is known only after its last micro-batch, because
    some tasks draw them anew (``per_target``). ``statistics`` go to ``PassLoss.take`` after the
    gradients are computed.
    """

    summed: torch.Tensor
    targets: torch.Tensor
    minimised: torch.Tensor
    statistics: Sequence[Statistics] = ()


class PassLoss:
    """The training objective of a pass over sites with these ``examples``, from ``flat`` on."""

    def __init__(
        self,
        stack: Stack,
        trained: Layout,
        settings: Training,
        examples: Sequence[Examples],
        flat: torch.Tensor,
    ) -> None:
        self.stack, self.trained, self.settings = stack, trained, settings
        self.alignment: Alignment | None = None
        self.consolidation: Consolidation | None = None
        if settings.consolidation is not None:
            self.consolidation = Consolidation(settings.consolidation, trained, flat)
        self.hide: Vary | None = None  # hides parts of each example, which are to be predicted
        self.vary: Vary | None = None  # changes a batch each time it is used
        if corrupt := stack.bench.task.corruption(examples[0]):  # the settings of all are equal
            self.vary = self.hide = _on_tensors(corrupt)
        elif settings.augmentation is not None:
            self.vary = open_augmentation(settings.augmentation)
        self.anchor = flat.clone() if settings.proximal else None
        if settings.domain is not None:
            self.alignment = Alignment(settings.domain, trained, examples, flat, stack.bench.seed)

    def of(self, batch: Batch, views: Sequence[torch.Tensor]) -> Value:
        """Return the value for ``batch``, computed with the tensors ``views`` [sites, ...]."""
        if self.alignment is None:
            return self._labelled(batch)
        with watch_features(self.stack) as seen:
            value = self._labelled(batch)
        terms, statistics = self.alignment.losses(
            seen[0], batch.feeds, batch.real, views, batch.progress
        )
        total = value.minimised
        for term, real, size in zip(terms, batch.real, batch.sizes, strict=True):
            total = total + term * (len(real) / size)
        return Value(value.summed, value.targets, total, statistics)

    def take(self, value: Value, batch: Batch) -> None:
        """Add the statistics of ``batch``; call it only after memory sufficed for its gradients."""
        if self.alignment is not None:
            self.alignment.take(value.statistics, [len(real) for real in batch.real])

    def pull(self, gradient: torch.Tensor, flat: torch.Tensor) -> None:
        """Add the terms that hold values back to the ``gradient`` of whole batches.

        ``gradient`` and ``flat`` are [active, values]. The terms are consolidation and FedProx (Li
        et al. 2020): mu/2 |x - x0|^2, where x0 is the vector that training started from.
        """
        if self.consolidation is not None:
            self.consolidation.pull(gradient, flat)
        if self.anchor is not None:
            gradient.add_(flat - self.anchor[: len(flat)], alpha=self.settings.proximal)

    def finish(self, number: int, vector: Vector, feed: Feed, generator: torch.Generator) -> None:
        """Put the statistics that a site sends beside its adapter into its trained ``vector``.

        ``feed`` and ``generator`` are the site's own. The stack computes with other adapters
        afterwards.
        """
        if self.alignment is not None:
            self.alignment.write(number, vector)
        if self.consolidation is not None:
            self.stack.randomness.rows = ()  # no dropout
            hidden = None if self.hide is None else _hiding(self.hide, feed, generator)
            measured = fisher_information(self.stack, self.trained, feed, vector, hidden)
            self.consolidation.write(number, vector, measured)

    def _labelled(self, batch: Batch) -> Value:
        each, targets = self._each(batch)
        rows = len(batch.padded[0])
        weights = torch.tensor([[float(n < len(i)) for n in range(rows)] for i in batch.real])
        weights = weights.to(each.device)
        summed, counted = (
            (one.view(len(batch.feeds), rows) * weights).sum(1) for one in (each, targets)
        )
        share = torch.tensor([1 / size for size in batch.sizes], device=each.device)
        return Value(summed, counted, (summed * share).sum())

    def _varied(self) -> VaryFeed | None:
        """Return the function that changes each site's batch; the stack knows the real rows."""
        vary = self.vary
        if vary is None:
            return None
        rows = self.stack.randomness.rows
        return lambda number, inputs, targets: vary(inputs, targets, rows[number])

    def _each(self, batch: Batch) -> Losses:
        """Return the loss and the targets of every row, both float32 [sites x rows]."""
        logits, targets = predict(batch.feeds, batch.padded, batch.width, self._varied())
        each = self.stack.objective.losses(logits, targets, smoothing=self.settings.label_smoothing)
        distillation = self.settings.distillation
        if distillation is None:
            return each
        teacher = teacher_logits_of(batch.feeds, batch.padded)
        if teacher is None:
            raise SiteFailure("no-teacher")
        teacher = restrict(teacher.to(logits.device), targets, self.stack.bench.heads)
        far = distances(logits, teacher, distillation.temperature)
        mixed = (1 - distillation.weight) * each.summed + distillation.weight * far
        return each._replace(summed=mixed)


def per_target(sizes: Sequence[int], targets: torch.Tensor) -> torch.Tensor:
    """Return the factor [sites] that turns gradients per row into gradients per target.

    ``sizes`` are the rows of the sites' batches, ``targets`` [sites] the targets in these rows. A
    row with one target gives exactly 1.0. A batch without any target has no gradient.
    """
    rows = torch.tensor(sizes, dtype=targets.dtype, device=targets.device)
    return rows / targets.clamp(min=1.0)


def _hiding(hide: Vary, feed: Feed, generator: torch.Generator) -> VaryFeed:
    """Return the function that hides parts of the examples of ``feed``, as a site draws them."""

    def vary(number: int, inputs: Inputs, targets: torch.Tensor) -> tuple[Inputs, torch.Tensor]:
        width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return hide(inputs, targets, SiteRows(len(targets), width, feed.left, generator))

    return vary


def _on_tensors(corrupt: Corrupt) -> Vary:
    """Return a task's function of NumPy arrays as a function of tensors on the same memory."""

    def vary(inputs: Inputs, targets: torch.Tensor, rows: SiteRows) -> tuple[Inputs, torch.Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        changed, wanted = corrupt(arrays, targets.numpy(), rows)
        return as_tensors(changed), torch.from_numpy(wanted)

    return vary
