"""Compute logits of a stack from examples, with cached activations where there are any."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.data.batches import Inputs, Passes, as_tensors
from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.cut import Prefix
from fedgraft.client.model.frozen_prefix import FEWEST, find_prefix
from fedgraft.client.objectives import restrict
from fedgraft.common.examples import Examples, Indices
from fedgraft.common.layout import Layout

__all__ = [
    "Feed",
    "VaryFeed",
    "compute",
    "logits_of",
    "open_feed",
    "predict",
    "teacher_logits_of",
]

COMPUTED = 64  # examples in one pass through the frozen layers
WHOLE = 16  # tokens; if a width is no multiple of a vector, sums over it add in another order

VaryFeed = Callable[[int, Inputs, torch.Tensor], tuple[Inputs, torch.Tensor]]


class Feed:
    """One site's examples as inputs of a stack, padded on the side that fits its model.

    ``kept`` are the cached activations of all examples: the inputs of the first trained layer, as
    ``compute`` gives them. If ``kept`` is None, they are computed when they are needed.
    """

    def __init__(
        self, stack: Stack, examples: Examples, prefix: Prefix | None, kept: torch.Tensor | None
    ) -> None:
        self.stack, self.prefix, self.kept = stack, prefix, kept
        self.examples = stack.settle(examples)
        self._starts = _starts(np.asarray(examples.lengths))

    @property
    def left(self) -> bool:
        """Whether padding stands before the tokens."""
        return self.examples.pad_left

    def width(self, index: Indices) -> int:
        """Return the number of tokens of the longest example at ``index``; 0 for images."""
        return self.examples.width(index)

    def batch(self, index: Indices, width: int) -> Inputs:
        """Return the model's inputs for the examples at ``index``, padded to ``width`` tokens."""
        return as_tensors(self.examples.batch(index, width))

    def targets(self, index: Indices, width: int) -> torch.Tensor:
        """Return the targets of ``batch(index, width)``."""
        return torch.from_numpy(self.examples.targets(index, width))

    def hidden(self, prefix: Prefix, index: Indices, width: int) -> torch.Tensor:
        """Return the input of the first trained layer: [rows, (width,) ...], padded with zeros."""
        lengths = np.asarray(self.examples.lengths)[index]
        if self.kept is None:
            units = int(lengths.sum()) if prefix.by_token else len(index)
            flat, starts = prefix.unit.new_empty(units, *prefix.unit.shape[1:]), _starts(lengths)
            compute(prefix, self.examples, index, flat)
        else:
            flat, starts = self.kept, self._starts[index]
        if not prefix.by_token:
            return flat if self.kept is None else flat[torch.from_numpy(index)]
        within = np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
        source = torch.from_numpy(within + np.repeat(starts, lengths))
        rows = torch.from_numpy(np.repeat(np.arange(len(index)), lengths))
        before = np.repeat(width - lengths, lengths) if self.left else 0
        hidden = flat.new_zeros(len(index), width, *flat.shape[1:])
        hidden[rows, torch.from_numpy(within + before)] = flat[source]
        return hidden


def logits_of(
    feeds: Sequence[Feed],
    indices: Sequence[Indices],
    width: int,
    given: Sequence[Inputs] | None = None,
) -> torch.Tensor:
    """Return logits of the examples at ``indices`` of each feed, float32 [feeds x rows, classes].

    Every feed gives the same number of rows, padded to ``width`` tokens. ``given`` replaces the
    examples' own inputs; it needs feeds that cache no activations.
    """
    stack, prefix = feeds[0].stack, feeds[0].prefix
    pairs = list(zip(feeds, indices, strict=True))
    inputs: Inputs = {}
    if prefix is None or prefix.whole:
        parts = given or [feed.batch(index, width) for feed, index in pairs]
        inputs = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if prefix is None:
        return stack.logits(inputs)
    hidden = torch.cat([feed.hidden(prefix, index, width) for feed, index in pairs])
    return prefix.resume(inputs, hidden.to(stack.device))


def predict(
    feeds: Sequence[Feed],
    indices: Sequence[Indices],
    width: int,
    vary: VaryFeed | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits as ``logits_of`` does, but only of each row's own head, and the targets.

    Targets are [feeds x rows, ...], int64 if they are classes. ``vary(number, inputs, targets)``
    changes inputs and targets of one feed; it needs feeds that cache no activations.
    """
    pairs = list(zip(feeds, indices, strict=True))
    found = [feed.targets(index, width) for feed, index in pairs]
    given: list[Inputs] | None = None
    if vary is not None:
        batches = [feed.batch(index, width) for feed, index in pairs]
        varied = [vary(n, *pair) for n, pair in enumerate(zip(batches, found, strict=True))]
        given, found = [inputs for inputs, _ in varied], [targets for _, targets in varied]
    logits = logits_of(feeds, indices, width, given)
    targets = torch.cat(found).to(logits.device)
    return restrict(logits, targets, feeds[0].stack.bench.heads), targets


def teacher_logits_of(feeds: Sequence[Feed], indices: Sequence[Indices]) -> torch.Tensor | None:
    """Return the teachers' logits of those examples, float32 [feeds x rows, classes].

    Return None unless every feed has a teacher.
    """
    pairs = zip(feeds, indices, strict=True)
    found = [(feed.examples.teacher_logits, index) for feed, index in pairs]
    parts = [torch.from_numpy(logits[index]) for logits, index in found if logits is not None]
    return torch.cat(parts) if len(parts) == len(feeds) else None


def open_feed(
    stack: Stack,
    trained: Layout,
    examples: Examples,
    store: Store | None,
    *,
    varied: bool = False,
) -> Feed:
    """Return the feed of ``examples``, with cached activations if ``store`` has room for them.

    Activations of ``varied`` examples cannot be cached.
    """
    examples = stack.settle(examples)
    prefix = None if varied else _prefix(stack, trained, examples)
    if prefix is None:
        return Feed(stack, examples, None, None)
    units = int(np.sum(examples.lengths)) if prefix.by_token else len(examples)
    kept = _kept(store, prefix, examples, (units, *prefix.unit.shape[1:])) if store else None
    return Feed(stack, examples, prefix, kept)


def _kept(
    store: Store, prefix: Prefix, examples: Examples, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """Return the activations of all examples from ``store``; None if it has no room for them."""
    dtype = prefix.unit.dtype
    carrier = {2: np.int16, 4: np.int32}[dtype.itemsize]  # a dtype of NumPy for the same bits
    key = hashlib.sha256(f"{prefix.identity}\n{examples.digest}".encode()).hexdigest()
    every = np.arange(len(examples))

    def fill(array: NDArray[Any]) -> None:
        compute(prefix, examples, every, torch.from_numpy(array).view(dtype))

    def make() -> dict[str, NDArray[Any]]:
        array = np.empty(shape, carrier)
        fill(array)
        return {"hidden": array}

    if store.fits(int(np.prod(shape)) * dtype.itemsize):
        return torch.from_numpy(store.get(key, make)["hidden"]).view(dtype)
    mapped = store.files.mapped(key, shape, carrier, fill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array is read-only, and nothing writes to it
        return None if mapped is None else torch.from_numpy(mapped).view(dtype)


def _prefix(stack: Stack, trained: Layout, examples: Examples) -> Prefix | None:
    """Return the stack's prefix below ``trained``; it is searched once, with the first examples."""
    if trained.names not in stack.prefixes:
        if not len(examples):
            return None
        some = np.resize(np.arange(len(examples)), FEWEST)
        width = int(_widths(examples)[some].max())
        inputs = as_tensors(examples.batch(some, width))
        wider = as_tensors(examples.batch(some, min(width + WHOLE, examples.longest)))
        # With encoder and decoder, two sequences of different lengths would have to be cached.
        paired = "decoder_input_ids" in inputs
        stack.prefixes[trained.names] = (
            None if paired else find_prefix(stack, trained, inputs, wider=wider)
        )
    return stack.prefixes[trained.names]


def compute(prefix: Prefix, examples: Examples, index: Indices, out: torch.Tensor) -> None:
    """Write the input of the first trained layer into ``out``, for the examples at ``index``.

    ``out`` is [tokens, ...], example after example, or [examples, ...], on the CPU. The computation
    is always the same, whether its result is cached or not: the width of an example depends on that
    example only.

    Raises:
        SiteFailure: ``out-of-memory``: memory does not suffice for ``FEWEST`` examples.
    """
    lengths = np.asarray(examples.lengths)[index]
    starts, widths = _starts(lengths), _widths(examples)[index]
    passes = Passes(COMPUTED, fewest=FEWEST)
    for width in np.unique(widths):

        def stopped(some: Indices, width: int = int(width)) -> tuple[torch.Tensor, torch.Tensor]:
            rows = np.resize(some, max(len(some), FEWEST))
            inputs = as_tensors(examples.batch(index[rows], width))
            hidden = prefix.stop(inputs)[: len(some)].cpu()
            if not prefix.by_token:
                return torch.from_numpy(some), hidden
            into = np.concatenate([np.arange(starts[at], starts[at] + lengths[at]) for at in some])
            real = inputs["attention_mask"][: len(some)].bool()
            return torch.from_numpy(into), hidden[real]

        for _, (into, hidden) in passes.over(np.flatnonzero(widths == width), stopped):
            out[into] = hidden


def _widths(examples: Examples) -> Indices:
    """Return the width at which each example passes the frozen layers: whole vectors."""
    lengths = np.asarray(examples.lengths)
    widths: Indices = np.minimum(-(-lengths // WHOLE) * WHOLE, examples.longest)
    return widths


def _starts(lengths: Indices) -> Indices:
    starts: Indices = np.cumsum(lengths) - lengths
    return starts
