"""Features of examples: the output of a frozen backbone before any head.

The feature of a text is the mean of its tokens' last hidden states: sentence encoders are trained
like this (Reimers & Gurevych, "Sentence-BERT", 2019), and every text model has these states. The
feature of another example is the input of the head, averaged over positions. If the backbone has a
head of its own, the head's predictions are added.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgraft.client.data.batches import Inputs, Passes, as_tensors, by_length, in_order
from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.frozen_prefix import identity_of
from fedgraft.client.model.pooling import pooled
from fedgraft.common.backbones.load import head_names
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Examples, Indices

__all__ = ["Features", "blocks_of", "features_of"]

BATCH = 64
BLOCK = 4096  # examples whose features are held at once


@dataclass(frozen=True)
class Features:
    """The features of n examples: ``labels`` int64 [n], ``values`` float32 [n, d].

    ``probabilities``, float32 [n, z], are those of the source labels; z is 0 without a source head.
    """

    labels: Indices
    values: NDArray[np.float32]
    probabilities: NDArray[np.float32]


def blocks_of(stack: Stack, examples: Examples, store: Store) -> Iterator[Features]:
    """Yield the features of all examples, at most ``BLOCK`` at a time, cached in ``store``.

    Raises:
        BackboneError: the backbone's features cannot be found, or are not finite.
    """
    for start in range(0, len(examples), BLOCK):
        some = examples.subset(np.arange(start, min(start + BLOCK, len(examples))))
        key = f"{identity_of(stack, 'features')}\n{stack.bench.fresh_head}\n{some.digest}"

        def make(some: Examples = some) -> dict[str, NDArray[Any]]:
            found = features_of(stack, some)
            return {"values": found.values, "probabilities": found.probabilities}

        kept = store.get(hashlib.sha256(key.encode()).hexdigest(), make)
        yield Features(some.labels, kept["values"], kept["probabilities"])


def features_of(stack: Stack, examples: Examples) -> Features:
    """Return the features of ``examples``, which are batched by length.

    Raises:
        BackboneError: as ``blocks_of``.
    """
    stack.put_one(stack.bench.layout, stack.bench.initial)
    examples = stack.settle(examples)
    kept = 0 if stack.bench.fresh_head else None

    def forward(index: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(stack, as_tensors(examples.batch(index, examples.width(index))))

    passes = Passes(BATCH)
    parts = [part for batch in by_length(examples, BATCH) for part in passes.over(batch, forward)]
    batches = [index for index, _ in parts]
    found = in_order(batches, [values for _, (values, _) in parts]).numpy()
    predicted = [logits.softmax(-1)[:, :kept] for _, (_, logits) in parts]
    if not np.isfinite(found).all():
        raise BackboneError(
            f"{stack.bench.backbone.source}: some of its features are not finite",
            hint='its weights are damaged, or training.precision = "fp32"',
        )
    return Features(examples.labels, found, in_order(batches, predicted).numpy())


@torch.inference_mode()
def _forward(stack: Stack, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [b, d] and logits [b, z] of one batch, float32 on the CPU."""
    caught: list[torch.Tensor] = []
    mask = inputs.get("attention_mask")
    text = "input_ids" in inputs and mask is not None

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        caught.append(output[0] if hidden is None else hidden)

    def entering(module: nn.Module, args: Any) -> None:
        caught.extend(args[:1])

    model = stack.model
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if text and isinstance(body, nn.Module):
        handles = [body.register_forward_hook(leaving)]
    else:
        heads = head_names(model) if not text else ()
        handles = [model.get_submodule(n).register_forward_pre_hook(entering) for n in heads]
    try:
        logits = stack.logits(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not caught or (text and mask is not None and caught[0].shape[:2] != mask.shape):
        raise BackboneError(
            f"{stack.bench.backbone.source}: no features were found in this architecture",
            hint="a model of transformers with one body and one head on top of it",
        )
    return pooled(caught[0].float(), mask if text else None).cpu(), logits.cpu()
