"""The side on which examples are padded: the one where padding changes no answer.

Some tokenizers pad on the left, for generation. A classifier that counts positions from the left,
or reads the first token, then gives an example another answer in each batch. Padding on the right
changes nothing for it: its mask hides what comes later. A few models read the last position, and
only they need padding on the left. Which side is right follows from the model, so it is tried.
"""

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from fedgraft.client.data.batches import Inputs, as_tensors
from fedgraft.common.examples import Examples, Wrapped

__all__ = ["Padding"]

MORE = 16  # tokens of padding with which the model is tried
AGREEMENT = 1e-3  # of outputs with and without padding; rounding differs by less

E = TypeVar("E", bound=Examples)


class Padding:
    """The side of padding that fits ``model``; it is found out with the first examples."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.right: bool | None = None

    def settle(self, examples: E, sites: int = 1) -> E:
        """Return ``examples``, padded on the side on which padding changes no answer.

        A model that computes with the adapters of several ``sites`` takes a multiple of this number
        of rows. Examples that are padded on the right stay as they are.
        """
        if not examples.pad_left or not len(examples):
            return examples
        if self.right is None:
            self.right = self._tried(examples, sites)
        settled: E = examples if self.right is False else _padded_right(examples)
        return settled

    @torch.no_grad()
    def _tried(self, examples: Examples, sites: int) -> bool | None:
        """Return whether padding on the right is better; None if no example can be padded."""
        shortest = np.repeat(np.argmin(examples.lengths), sites)
        length = examples.width(shortest)
        width = min(length + MORE, examples.longest)
        if width == length:
            return None
        alone = self._output(as_tensors(examples.batch(shortest, length)))
        left = self._output(as_tensors(examples.batch(shortest, width)))
        right = self._output(as_tensors(_padded_right(examples).batch(shortest, width)))
        if right.shape != alone.shape:  # an output for each token
            left, right = left[:, -length:], right[:, :length]
        allowed = AGREEMENT * (1 + float(alone.abs().max()))
        changed = [float((one - alone).abs().max()) for one in (left, right)]
        return changed[1] <= changed[0] + allowed

    def _output(self, inputs: Inputs) -> torch.Tensor:
        device = next(self.model.parameters()).device
        moved = {name: value.to(device) for name, value in inputs.items()}
        output: torch.Tensor = self.model(**moved).logits
        return output.float()


def _padded_right(examples: Any) -> Any:
    """Return the same examples with padding after the tokens."""
    if isinstance(examples, Wrapped):
        return replace(examples, source=_padded_right(examples.source))
    return replace(examples, pad_left=False)
