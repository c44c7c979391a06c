"""Measure the model on a site's examples; only sums leave, the predictions stay."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn import functional

from fedgraft.client.data import Examples
from fedgraft.common.metrics import Tally

__all__ = ["Evaluation", "evaluate"]

BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """The summed ``loss`` (nats), true and predicted labels, both int64 [examples], in their order.

    What follows from them is worked out when asked for: thousands of sites' confusion matrices,
    most of them zeros, need not be held.
    """

    loss: float
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: int

    @property
    def tally(self) -> Tally:
        """The sums."""
        return Tally.of(self.loss, self.true, self.predicted, self.classes)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which examples were predicted right, bool [examples]."""
        correct: NDArray[np.bool_] = self.predicted == self.true
        return correct


@torch.inference_mode()
def evaluate(
    model: PeftModel, examples: Examples, *, classes: int, precision: str = "fp32"
) -> Evaluation:
    """Evaluate ``model`` in eval mode on all of ``examples``, in order."""
    model.eval()
    device = next(model.parameters()).device
    predicted = np.empty(len(examples), np.int64)
    loss = 0.0
    for start in range(0, len(examples), BATCH):
        index = np.arange(start, min(start + BATCH, len(examples)))
        inputs = {key: value.to(device) for key, value in examples.batch(index).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(**inputs).logits.float()
        labels = torch.from_numpy(examples.labels[index]).to(device)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        predicted[index] = logits.argmax(-1).cpu().numpy()
    # A copy: the labels may be a window on all of a site's data.
    return Evaluation(loss, np.array(examples.labels, np.int64), predicted, classes)
