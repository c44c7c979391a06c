"""Objectives: the loss and the counts for each kind of target, one class each, and their table.

A task names its target (``common.tasks``). An objective defines three things: the part of a model's
output that is compared with the targets, the loss of each example, and the numbers that the task's
measures add up.

The loss of a batch is its summed loss divided by the number of its targets. An example has one
target if it has one label; a text has one target for each token that counts. So a long text counts
more than a short one, as in the losses of transformers, and training minimises what is reported.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from fedgraft.common.examples import AT_ONCE, IGNORED, OUTPUTS

__all__ = ["OBJECTIVES", "Losses", "Objective", "distances", "restrict"]

CLOSE = 0.1  # mean absolute error below which a patch is right, in pixels as the model reads them


class Losses(NamedTuple):
    """The losses of a batch: ``summed`` over the targets of each example, float32 [b].

    ``targets`` are the numbers of targets of each example, float32 [b].
    """

    summed: torch.Tensor
    targets: torch.Tensor


class Objective(Protocol):
    """The comparison of predictions with targets, both of one batch [b, ...]."""

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """Return the part of a model's ``output`` that is compared, float32."""

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> Losses:
        """Return the losses of a batch.

        If targets are classes, ``smoothing`` is the share of each target that is spread over all
        possible classes (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer
        Vision", section 7).
        """

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Return the mapping that ``Collector.add`` takes: NumPy arrays and floats."""

    def at_once(self, outputs: int, longest: int) -> int:
        """Return the number of examples to evaluate in one pass.

        An example has up to ``longest`` tokens with ``outputs`` each.
        """


class Labels:
    """One class per example: cross entropy in nats of logits [b, classes], targets int64 [b]."""

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = output.logits
        return logits.float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> Losses:
        """Return the cross entropy; an example without a label has loss 0, and counts."""
        each = functional.cross_entropy(predicted, targets, reduction="none")
        each = _smoothed(each, predicted, targets != IGNORED, smoothing)
        return Losses(each, torch.ones_like(each))

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Return the summed ``loss``, ``true`` and ``predicted`` labels int64 [b], ``logits``."""
        return {
            "loss": float(functional.cross_entropy(predicted, targets, reduction="sum")),
            "true": targets.cpu().numpy(),
            "predicted": predicted.argmax(-1).cpu().numpy(),
            "logits": predicted.float().cpu().numpy(),
        }

    def at_once(self, outputs: int, longest: int) -> int:
        """Return the usual number."""
        return AT_ONCE


class Tokens:
    """One class per position: logits [b, width, classes], targets int64 [b, width].

    ``IGNORED`` marks positions that do not count.
    """

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = output.logits
        return logits.float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> Losses:
        """Return the cross entropy summed over an example's targets, in nats."""
        each, counted = self._by_position(predicted, targets, smoothing)
        return Losses(each.sum(1), counted.sum(1).to(each.dtype))

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Return counts of each example, and classes of each position.

        Of each example, [b]: the summed ``losses``, the number of ``right`` tokens, and the number
        of all ``counted`` tokens. Of each position, [b, width]: the ``true`` class and the
        ``predicted`` class, both ``IGNORED`` where none counts.
        """
        each, counted = self._by_position(predicted, targets, 0.0)
        likeliest = torch.full_like(targets, IGNORED)
        likeliest[counted] = predicted[counted].argmax(-1)
        right = counted & (likeliest == targets)
        found = {
            "losses": each.sum(1),
            "right": right.sum(1),
            "counted": counted.sum(1),
            "true": targets,
            "predicted": likeliest,
        }
        return {name: value.cpu().numpy() for name, value in found.items()}

    def at_once(self, outputs: int, longest: int) -> int:
        """Return a smaller number if examples are long and the vocabulary is large."""
        return max(1, min(AT_ONCE, OUTPUTS // (outputs * max(longest, 1))))

    def _by_position(
        self, logits: torch.Tensor, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss at each position, [b, width], and the mask of positions with a target.

        The loss is zero without a target. It is computed only at positions with one, because a
        vocabulary is large, and with hidden tokens only one position in seven counts.
        """
        counted = targets != IGNORED
        some, wanted = logits[counted], targets[counted]
        each = functional.cross_entropy(some, wanted, reduction="none")
        each = _smoothed(each, some, torch.ones_like(wanted, dtype=torch.bool), smoothing)
        return each.new_zeros(counted.shape).masked_scatter(counted, each), counted


class Patches:
    """Hidden patches of images: predictions and targets are pixels float32 [b, patches, values].

    NaN marks the targets of patches that are not hidden. The loss of a patch is its mean absolute
    error.
    """

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """Return the reconstructed image, in patches row by row."""
        side = int(model.config.patch_size)
        painted: torch.Tensor = output.reconstruction
        return functional.unfold(painted, side, stride=side).transpose(1, 2).float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> Losses:
        """Return the mean absolute error of a patch, summed over an image's hidden patches."""
        each, counted = self._by_patch(predicted, targets)
        return Losses(each.sum(1), counted.sum(1).to(each.dtype))

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Return counts of each image, [b]: summed ``losses``, ``right`` (close) and ``counted``.

        These count hidden patches.
        """
        each, counted = self._by_patch(predicted, targets)
        right = counted & (each < CLOSE)
        found = {"losses": each.sum(1), "right": right.sum(1), "counted": counted.sum(1)}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def at_once(self, outputs: int, longest: int) -> int:
        """Return the usual number."""
        return AT_ONCE

    def _by_patch(
        self, painted: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the error of each patch, [b, patches], and the mask of hidden patches.

        The error is zero for a patch that is not hidden.
        """
        counted = ~targets[..., 0].isnan()
        off = (painted[counted] - targets[counted]).abs().mean(-1)
        return off.new_zeros(counted.shape).masked_scatter(counted, off), counted


class Numbers:
    """One number per example: output [b] of a head with one output, targets float32 [b]."""

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """Return the head's only output."""
        logits: torch.Tensor = output.logits
        return logits[..., 0].float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> Losses:
        """Return the squared error."""
        each = (predicted - targets) ** 2
        return Losses(each, torch.ones_like(each))

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Return for each example, [b]: the ``true`` and the ``predicted`` number, ``losses``."""
        found = {
            "true": targets,
            "predicted": predicted,
            "losses": self.losses(predicted, targets).summed,
        }
        return {name: value.cpu().numpy() for name, value in found.items()}

    def at_once(self, outputs: int, longest: int) -> int:
        """Return the usual number."""
        return AT_ONCE


OBJECTIVES: dict[str, Objective] = {
    "label": Labels(),
    "tokens": Tokens(),
    "patches": Patches(),
    "number": Numbers(),
}


def _smoothed(
    each: torch.Tensor, logits: torch.Tensor, counts: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Return ``each`` loss, mixed with the loss against a uniform target over possible classes."""
    if not smoothing:
        return each
    possible = logits > -torch.inf
    spread = -torch.where(possible, logits.log_softmax(-1), 0.0).sum(-1) / possible.sum(-1)
    return (1 - smoothing) * each + smoothing * spread * counts


def distances(logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) at temperature T in nats, float32 [b]; both [b, classes].

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network": the factor T^2 keeps the
    size of the gradient the same for every T.
    """
    wanted = (taught / temperature).softmax(-1)
    terms = (taught / temperature).log_softmax(-1) - (logits / temperature).log_softmax(-1)
    # A class that is impossible for both adds nothing: its term would be 0 * (infinity - infinity).
    summed = (wanted * torch.where(wanted > 0, terms, 0.0)).sum(-1)
    return temperature**2 * summed


def restrict(logits: torch.Tensor, targets: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Return ``logits`` [b, classes] with minus infinity for every class of another head.

    ``heads`` names the head of each class; it is empty if all classes have one head. The head of a
    row is that of its target. A row without a target keeps all classes.
    """
    if not heads:
        return logits
    of = torch.tensor(heads, device=logits.device)
    mine = of[targets.clamp(min=0)][:, None] == of
    mine |= (targets == IGNORED)[:, None]
    return logits.masked_fill(~mine, -torch.inf)
