"""What is minimised and what is counted, for each kind of target: one class each, and the table.

A task names its target (``common.tasks``). An objective says what of a model's output is compared
with the targets, the loss of each example, and the numbers that the task's measures add up.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.nn import functional

from fedgraft.common.examples import IGNORED

__all__ = ["OBJECTIVES", "Objective", "distances", "restrict"]

AT_ONCE = 64  # examples that are evaluated in one pass
LOGITS = 1 << 25  # in memory at once: 128 MB; a vocabulary is large
CLOSE = 0.1  # mean absolute error of a patch, of pixels as the model reads them


class Objective(Protocol):
    """How predictions are compared with targets, both of one batch [b, ...]."""

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """What of a model's ``output`` is compared, float32."""

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> torch.Tensor:
        """The loss of each example, float32 [b].

        With ``smoothing`` that share of each target is spread over all classes that are possible
        (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
        section 7), where targets are classes.
        """

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """What the collector of the task's measures takes, as NumPy arrays and floats."""

    def at_once(self, outputs: int, longest: int) -> int:
        """Examples to evaluate in one pass, of up to ``longest`` tokens with ``outputs`` each."""


class Labels:
    """One class an example: cross entropy in nats of logits [b, classes], targets int64 [b]."""

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = output.logits
        return logits.float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Cross entropy; an example without a label costs nothing."""
        each = functional.cross_entropy(predicted, targets, reduction="none")
        return _smoothed(each, predicted, targets != IGNORED, smoothing)

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """The summed ``loss``, ``true`` and ``predicted`` labels int64 [b], ``logits`` float."""
        return {
            "loss": float(functional.cross_entropy(predicted, targets, reduction="sum")),
            "true": targets.cpu().numpy(),
            "predicted": predicted.argmax(-1).cpu().numpy(),
            "logits": predicted.float().cpu().numpy(),
        }

    def at_once(self, outputs: int, longest: int) -> int:
        """As many as usual."""
        return AT_ONCE


class Tokens:
    """A class a position: logits [b, width, classes], targets int64 [b, width].

    ``IGNORED`` marks positions that do not count.
    """

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = output.logits
        return logits.float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> torch.Tensor:
        """The mean cross entropy over an example's targets, nats."""
        each, counted = self._by_position(predicted, targets, smoothing)
        return each.sum(1) / counted.sum(1).clamp(min=1)

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Of each example, [b]: summed ``losses``, ``right`` tokens, and all that are ``counted``.

        And of each position, [b, width]: the ``true`` class, ``IGNORED`` where none counts, and the
        ``predicted`` one.
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
        """Fewer where they are long and the vocabulary is large."""
        return max(1, min(AT_ONCE, LOGITS // (outputs * max(longest, 1))))

    def _by_position(
        self, logits: torch.Tensor, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss at each position, [b, width], zero without a target, and which have one.

        Only of those it is computed: a vocabulary is large, and of hidden tokens one in seven
        counts.
        """
        counted = targets != IGNORED
        some, wanted = logits[counted], targets[counted]
        each = functional.cross_entropy(some, wanted, reduction="none")
        each = _smoothed(each, some, torch.ones_like(wanted, dtype=torch.bool), smoothing)
        return each.new_zeros(counted.shape).masked_scatter(counted, each), counted


class Patches:
    """Hidden patches of images: pixels float32 [b, patches, values] of both.

    NaN marks the targets of patches that are not hidden. The loss is the mean absolute error.
    """

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """The painted image, in patches row by row."""
        side = int(model.config.patch_size)
        painted: torch.Tensor = output.reconstruction
        return functional.unfold(painted, side, stride=side).transpose(1, 2).float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> torch.Tensor:
        """The mean absolute error over an image's hidden patches."""
        each, counted = self._by_patch(predicted, targets)
        return each.sum(1) / counted.sum(1).clamp(min=1)

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Of each image, [b]: summed ``losses``, ``right`` patches that are close, ``counted``."""
        each, counted = self._by_patch(predicted, targets)
        right = counted & (each < CLOSE)
        found = {"losses": each.sum(1), "right": right.sum(1), "counted": counted.sum(1)}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def at_once(self, outputs: int, longest: int) -> int:
        """As many as usual."""
        return AT_ONCE

    def _by_patch(
        self, painted: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The error of each patch, [b, patches], zero where it is not hidden, and which are."""
        counted = ~targets[..., 0].isnan()
        off = (painted[counted] - targets[counted]).abs().mean(-1)
        return off.new_zeros(counted.shape).masked_scatter(counted, off), counted


class Numbers:
    """One number an example: output [b] of a head with one output, targets float32 [b]."""

    def predicted(self, output: Any, model: Any) -> torch.Tensor:
        """The head's only output."""
        logits: torch.Tensor = output.logits
        return logits[..., 0].float()

    def losses(
        self, predicted: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> torch.Tensor:
        """The squared error."""
        return (predicted - targets) ** 2

    def counts(self, predicted: torch.Tensor, targets: torch.Tensor) -> Mapping[str, Any]:
        """Of each example, [b]: the ``true`` and the ``predicted`` number, and ``losses``."""
        found = {
            "true": targets,
            "predicted": predicted,
            "losses": self.losses(predicted, targets),
        }
        return {name: value.cpu().numpy() for name, value in found.items()}

    def at_once(self, outputs: int, longest: int) -> int:
        """As many as usual."""
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
    """``each`` loss with a share of that against the uniform distribution over what is possible."""
    if not smoothing:
        return each
    possible = logits > -torch.inf
    spread = -torch.where(possible, logits.log_softmax(-1), 0.0).sum(-1) / possible.sum(-1)
    return (1 - smoothing) * each + smoothing * spread * counts


def distances(logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) at temperature T in nats, float32 [b]; both [b, classes].

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network": T^2 keeps its gradient of
    one size whatever T is.
    """
    wanted = (taught / temperature).softmax(-1)
    terms = (taught / temperature).log_softmax(-1) - (logits / temperature).log_softmax(-1)
    # What is impossible for both is no term: it would be 0 times infinity minus infinity.
    summed = (wanted * torch.where(wanted > 0, terms, 0.0)).sum(-1)
    return temperature**2 * summed


def restrict(logits: torch.Tensor, targets: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """``logits`` [b, classes] with minus infinity wherever a class is of another head.

    ``heads`` names each class's head; that of a row is its target's. None with one head for all,
    and a row without a target keeps all of its classes.
    """
    if not heads:
        return logits
    of = torch.tensor(heads, device=logits.device)
    mine = of[targets.clamp(min=0)][:, None] == of
    mine |= (targets == IGNORED)[:, None]
    return logits.masked_fill(~mine, -torch.inf)
