"""Domain adaptation: make the features of sites without labels like those of labelled sites.

There are three methods. Each adds a loss to the loss of the labels, times a weight that grows from
0 over the federation's training, as in Ganin et al. 2016:

    coral  distance between covariances (Sun and Saenko 2016, "Deep CORAL")
    mmd    distance between mean embeddings in a kernel's space (Long et al. 2015, "Deep Adaptation
           Networks"), with random Fourier features
    dann   a discriminator, which the features are trained to mislead (Ganin et al. 2016, "Domain-
           Adversarial Training of Neural Networks")

In these papers, one batch has examples of both groups. Here a site has examples of its own group
only. The other group's statistics, or the discriminator, come with the adapter, as they were after
the last round. A single batch says little about a covariance. Therefore the loss compares means
over about an epoch, and the gradient is that of the current batch. Features are scaled to length
one, so that sites compare directions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import Feed
from fedgraft.client.model.pooling import pooled
from fedgraft.common.adapters.domain_statistics import GROUPS, frequencies
from fedgraft.common.backbones.load import head_names
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.training import DomainAdaptation
from fedgraft.common.examples import Examples, has_labels
from fedgraft.common.layout import DOMAIN, Layout, Vector

__all__ = ["Alignment", "Statistics", "growth", "watch_features"]

STEEPNESS = 10.0  # how steeply the weight grows, as in Ganin et al.

Statistics = dict[str, torch.Tensor]


def growth(progress: float) -> float:
    """Return the factor of the weight at ``progress`` (0 to 1); it grows from 0 to nearly 1."""
    return 2 / (1 + math.exp(-STEEPNESS * progress)) - 1


@contextmanager
def watch_features(stack: Stack) -> Iterator[list[torch.Tensor]]:
    """Collect the head's inputs in all forward passes of ``stack`` inside the context."""
    seen: list[torch.Tensor] = []

    def entering(module: nn.Module, args: Any) -> None:
        seen.append(args[0])

    first = stack.model.get_submodule(head_names(stack.model)[0])
    handle = first.register_forward_pre_hook(entering)
    try:
        yield seen
    finally:
        handle.remove()


def direction(hidden: torch.Tensor, lengths: torch.Tensor, left: bool) -> torch.Tensor:
    """Return features of length one, float32 [b, d].

    ``hidden`` is [b, d], [b, positions, d] with ``lengths`` [b] (0: all positions), or
    [b, d, h, w]. The feature of a sequence is the mean over its positions without padding, which
    stands on the ``left`` or on the right.
    """
    hidden = hidden.float()
    mask: torch.Tensor | None = None
    if hidden.ndim == 3:
        width = hidden.shape[1]
        real = torch.where(lengths > 0, lengths, width).clamp(max=width).to(hidden.device)[:, None]
        at = torch.arange(width, device=hidden.device)
        mask = (at >= width - real) if left else (at < real)
    return functional.normalize(pooled(hidden, mask), dim=-1)


@dataclass
class _Member:
    """One site in a pass.

    ``epoch`` is its number of rows in an epoch, ``other`` holds the other group's means, and
    ``means`` its own running means over ``rows`` rows so far.
    """

    labelled: bool
    epoch: int
    other: Statistics | None
    rows: int = 0
    means: Statistics = field(default_factory=dict)

    def mixed(self, batch: Statistics, rows: int) -> Statistics:
        """Return the running means after adding a batch of ``rows`` rows."""
        rate = rows / max(min(self.rows + rows, self.epoch), rows)
        return {
            name: value if not self.means else torch.lerp(self.means[name], value, rate)
            for name, value in batch.items()
        }


class Alignment:
    """The alignment losses of the sites of a pass.

    ``flat`` [sites, trained.size] holds the vectors that the sites start from.
    """

    def __init__(
        self,
        settings: DomainAdaptation,
        trained: Layout,
        examples: Sequence[Examples],
        flat: torch.Tensor,
        seed: int,
    ) -> None:
        self.settings, self.trained = settings, trained
        self.places = [n for n, name in enumerate(trained.names) if name.startswith(DOMAIN)]
        self.members = []
        for row, own in zip(flat, examples, strict=True):
            labelled = has_labels(own)
            other = self._received(row, GROUPS[labelled])
            self.members.append(_Member(labelled, len(own), other))
        self.kernel: tuple[torch.Tensor, torch.Tensor] | None = None
        self.seed = seed

    def _received(self, row: torch.Tensor, group: str) -> Statistics | None:
        """Return the means over the sites of ``group``; None before any of them sent statistics."""
        names = {name.rpartition(".")[2]: name for name in self._slots(group)}
        if "seen" not in names or float(row[self.trained.slices[names["seen"]]]) <= 0:
            return None
        shapes = dict(zip(self.trained.names, self.trained.shapes, strict=True))
        seen = row[self.trained.slices[names.pop("seen")]]
        return {
            slot: (row[self.trained.slices[name]] / seen).view(shapes[name])
            for slot, name in names.items()
        }

    def _slots(self, group: str) -> list[str]:
        return [name for name in self.trained.names if name.startswith(f"{DOMAIN}{group}.")]

    def losses(
        self,
        hidden: torch.Tensor,
        feeds: Sequence[Feed],
        index: Sequence[Any],
        views: Sequence[torch.Tensor],
        progress: Sequence[float],
    ) -> tuple[list[torch.Tensor], list[Statistics]]:
        """Return each site's loss, and the statistics of its rows, which ``take`` needs.

        ``hidden`` [sites x rows, ...] is the input of the head. ``index`` has the real rows of each
        feed, which come first among its rows. ``views`` are the trained tensors [sites, ...].
        """
        rows = len(hidden) // len(feeds)
        terms: list[torch.Tensor] = []
        found: list[Statistics] = []
        for number, (feed, own) in enumerate(zip(feeds, index, strict=True)):
            lengths = torch.from_numpy(np.asarray(feed.examples.lengths)[own])
            part = hidden[number * rows : number * rows + len(own)]
            features = direction(part, lengths, feed.left)
            weight = self.settings.weight * growth(progress[number])
            if self.settings.kind == "dann":
                mine = [views[place][number] for place in self.places]
                terms.append(self._adversarial(features, number, mine, weight))
                found.append({})
                continue
            statistics = self._statistics(features)
            terms.append(weight * self._distance(number, len(own), statistics))
            found.append({name: value.detach() for name, value in statistics.items()})
        return terms, found

    def take(self, found: Sequence[Statistics], counts: Sequence[int]) -> None:
        """Add the statistics of a finished micro-batch; ``counts`` are the rows of each site."""
        for member, statistics, rows in zip(self.members, found, counts, strict=False):
            if rows:
                member.means = member.mixed(statistics, rows)
                member.rows += rows

    def write(self, number: int, vector: Vector) -> None:
        """Put a site's own statistics into its ``vector``.

        The slots of the other group get zeros.
        """
        if self.settings.kind == "dann":
            return
        member = self.members[number]
        for group in GROUPS:
            own = group == GROUPS[not member.labelled] and bool(member.means)
            for name in self._slots(group):
                where, slot = self.trained.slices[name], name.rpartition(".")[2]
                if not own:
                    vector[where] = 0
                elif slot == "seen":
                    vector[where] = SCALE
                else:
                    vector[where] = SCALE * member.means[slot].flatten().cpu().numpy()

    def _statistics(self, features: torch.Tensor) -> Statistics:
        """Return the statistics of ``features`` [r, d]: means over the rows."""
        rows = max(len(features), 1)
        if self.settings.kind == "coral":
            return {"mean": features.sum(0) / rows, "second": features.T @ features / rows}
        if self.kernel is None:
            weights, phases = frequencies(features.shape[1], self.settings.components, self.seed)
            self.kernel = weights.to(features.device), phases.to(features.device)
        waves = (features @ self.kernel[0] + self.kernel[1]).cos()
        return {"embedding": waves.sum(0) / rows * math.sqrt(2 / self.settings.components)}

    def _distance(self, number: int, rows: int, batch: Statistics) -> torch.Tensor:
        """Return the distance between this site's means and the other group's.

        The gradient of the site's means is that of the current batch.
        """
        member = self.members[number]
        # One example has no covariance: the gradient would be rounding error, and AdamW would
        # still take full steps.
        if member.other is None or not rows or member.epoch < 2:
            return next(iter(batch.values())).new_zeros(())
        with torch.no_grad():
            mixed = member.mixed(batch, rows)
        mine = {name: mixed[name] + value - value.detach() for name, value in batch.items()}
        if self.settings.kind == "mmd":
            return ((mine["embedding"] - member.other["embedding"]) ** 2).sum()
        return ((_covariance(mine) - _covariance(member.other)) ** 2).sum() / 4

    def _adversarial(
        self, features: torch.Tensor, number: int, layers: Sequence[torch.Tensor], weight: float
    ) -> torch.Tensor:
        """Return the discriminator's loss, minus ``weight`` times the same loss for the features.

        The first term trains only the discriminator. The second term trains only the features,
        which learn to mislead the discriminator.
        """
        if not len(features):
            return features.new_zeros(())
        scaled = features * math.sqrt(features.shape[1])
        wanted = scaled.new_full((len(scaled),), float(self.members[number].labelled))
        told = _discriminate(scaled.detach(), *layers)
        misled = _discriminate(scaled, *(layer.detach() for layer in layers))
        measure = functional.binary_cross_entropy_with_logits
        return measure(told, wanted) - weight * measure(misled, wanted)


def _covariance(means: Statistics) -> torch.Tensor:
    return means["second"] - torch.outer(means["mean"], means["mean"])


def _discriminate(
    x: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor,
    second: torch.Tensor,
    second_bias: torch.Tensor,
) -> torch.Tensor:
    """Return the logit, [rows], that an example comes from a site with labels."""
    hidden = functional.relu(functional.linear(x, first, first_bias))
    return functional.linear(hidden, second, second_bias).squeeze(-1)
