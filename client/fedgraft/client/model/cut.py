"""A cut of a model before its first trained layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedgraft.client.data.batches import Inputs

__all__ = ["Prefix"]


@dataclass(frozen=True)
class Prefix:
    """A cut before the first trained layer: a function to stop there, and one to resume.

    ``identity`` is a hash over the frozen model, its precision and device, and the place of the
    cut. Resuming needs the inputs only if ``whole``. ``by_token`` says that activations are
    [rows, tokens, ...]. ``unit`` is an empty tensor [0, ...] that has the shape and dtype of one
    token's activations (or of one row's).
    """

    identity: str
    whole: bool
    by_token: bool
    unit: torch.Tensor
    stop: Callable[[Inputs], torch.Tensor]
    resume: Callable[[Inputs, torch.Tensor], torch.Tensor]
