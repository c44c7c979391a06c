"""Encoded rows, ready to be cut into batches: what training and evaluation see of a site's data."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.objectives.labels import IGNORED

__all__ = [
    "ArrayExamples",
    "AudioExamples",
    "Examples",
    "ImageExamples",
    "Indices",
    "Taught",
    "TextExamples",
    "Wrapped",
    "concatenate",
]

Indices = NDArray[np.int64]


class Examples(Protocol):
    """Encoded rows: ``labels`` int64 [n], and any batch of them as inputs of the model."""

    @property
    def labels(self) -> Indices:
        """Index into the job's labels, per example."""

    @property
    def groups(self) -> Indices | None:
        """Index into the job's groups, per example, -1 for none; None where it has no groups."""

    @property
    def taught(self) -> NDArray[np.float32] | None:
        """A teacher's logits, float32 [n, classes]; None where there is no teacher."""

    @property
    def lengths(self) -> Indices:
        """Tokens per example; zeros where examples are not sequences."""

    @property
    def longest(self) -> int:
        """The most tokens that an example may have; 0 where they are not sequences."""

    @property
    def pad_left(self) -> bool:
        """Whether padding stands before the tokens."""

    @property
    def digest(self) -> str:
        """SHA-256 over all that goes into the model, in order; labels do not count."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory; what is shared with other examples counts for each."""

    def __len__(self) -> int:
        """The number of examples."""

    def width(self, index: Indices) -> int:
        """Tokens that a batch of the examples at ``index`` has; 0 where they are not sequences."""

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """The model's inputs (without labels) for the examples at ``index``, in that order.

        Sequences are padded to ``width`` tokens, or as ``width(index)`` says.
        """

    def targets(self, index: Indices, width: int = 0) -> torch.Tensor:
        """What the model should predict for ``batch(index, width)``, int64 [b] or [b, width]."""

    def subset(self, index: Indices) -> Self:
        """The examples at ``index``, in that order; shares the encoded rows."""

    def with_teacher(self, logits: NDArray[np.float32]) -> Self:
        """The same examples with ``taught``."""


@dataclass(frozen=True)
class Taught:
    """What examples of labels have in common: a teacher may have said something of each."""

    taught: NDArray[np.float32] | None = field(default=None, kw_only=True)

    def with_teacher(self, logits: NDArray[np.float32]) -> Self:
        """The same examples with ``taught``."""
        return replace(self, taught=logits)


@dataclass(frozen=True)
class TextExamples(Taught):
    """Token ids without padding: example i is ``ids[starts[i]:starts[i] + lengths[i]]``.

    ``labels``, ``starts`` and ``lengths`` int64 [n], ``ids`` int32 [tokens], ``types`` int8
    [tokens] only where the tokenizer gives token types. None is longer than ``longest``. Where the
    tokens themselves are ``predicted``, labels are all zero.
    """

    labels: Indices
    ids: NDArray[np.int32]
    starts: Indices
    lengths: Indices
    types: NDArray[np.int8] | None
    pad_id: int
    pad_left: bool
    longest: int
    predicted: bool = False
    groups: Indices | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over token ids, types and padding, example by example."""
        source = _source(self.starts, self.lengths)
        parts: list[NDArray[Any]] = [self.lengths, self.ids[source]]
        if self.types is not None:
            parts.append(self.types[source])
        return _digest(f"{self.pad_id} {self.pad_left} {self.longest}", *parts)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = (self.labels, self.ids, self.starts, self.lengths)
        return sum(a.nbytes for a in arrays) + (self.types.nbytes if self.types is not None else 0)

    def width(self, index: Indices) -> int:
        """The longest of the examples at ``index``."""
        return int(self.lengths[index].max(initial=0))

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` (``token_type_ids``), int64 [b, width]."""
        starts, lengths = self.starts[index], self.lengths[index]
        width = width or self.width(index)
        positions = np.arange(width)
        if self.pad_left:
            mask = positions >= (width - lengths)[:, None]
        else:
            mask = positions < lengths[:, None]
        source = _source(starts, lengths)
        inputs = {"input_ids": _padded(self.ids[source], mask, self.pad_id)}
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self.types is not None:
            inputs["token_type_ids"] = _padded(self.types[source], mask, 0)
        return inputs

    def targets(self, index: Indices, width: int = 0) -> torch.Tensor:
        """What should be predicted, int64: the labels [b], or the tokens that follow [b, width]."""
        if not self.predicted:
            return torch.from_numpy(self.labels[index])
        batch = self.batch(index, width)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:].where(mask[:, 1:] & mask[:, :-1], IGNORED)
        return targets

    def subset(self, index: Indices) -> "TextExamples":
        """The examples at ``index``, in that order; the token ids are shared."""
        return replace(
            self,
            labels=self.labels[index],
            starts=self.starts[index],
            lengths=self.lengths[index],
            groups=None if self.groups is None else self.groups[index],
            taught=None if self.taught is None else self.taught[index],
        )


@dataclass(frozen=True)
class Wrapped(Taught):
    """Examples made of others, ``source``: what is predicted is in them, so there are no labels."""

    source: "TextExamples | ImageExamples"

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Indices:
        """Zeros: there are none."""
        return self.source.labels

    @property
    def groups(self) -> None:
        """None: only labelled examples have groups."""
        return None

    @property
    def lengths(self) -> Indices:
        """Those of ``source``."""
        return self.source.lengths

    @property
    def longest(self) -> int:
        """That of ``source``."""
        return self.source.longest

    @property
    def pad_left(self) -> bool:
        """Where padding of ``source`` stands."""
        return self.source.pad_left

    def width(self, index: Indices) -> int:
        """The longest of the examples at ``index``."""
        return int(self.lengths[index].max(initial=0))


@dataclass(frozen=True)
class ArrayExamples(Taught):
    """Examples of one shape: ``labels`` int64 [n]; example i is ``values[rows[i]]``.

    ``values`` is float32 [m, ...], in memory or mapped from a file.
    """

    labels: Indices
    values: NDArray[np.float32]
    rows: Indices
    pad_left: bool = False
    longest: int = 0
    groups: Indices | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Indices:
        """Zeros: no sequences, or all padded alike."""
        return np.zeros(len(self.labels), np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the values, example by example."""
        digest = hashlib.sha256(str(self.values.shape[1:]).encode())
        for row in self.rows:
            digest.update(np.ascontiguousarray(self.values[row]).data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes in memory: values that are mapped from a file take none."""
        mapped = isinstance(self.values, np.memmap)
        return self.labels.nbytes + self.rows.nbytes + (0 if mapped else self.values.nbytes)

    def width(self, index: Indices) -> int:
        """None: there are no sequences."""
        return 0

    def targets(self, index: Indices, width: int = 0) -> torch.Tensor:
        """The labels, int64 [b]."""
        return torch.from_numpy(self.labels[index])

    def subset(self, index: Indices) -> Self:
        """The examples at ``index``, in that order; the values are shared."""
        return replace(
            self,
            labels=self.labels[index],
            rows=self.rows[index],
            groups=None if self.groups is None else self.groups[index],
            taught=None if self.taught is None else self.taught[index],
        )

    def _taken(self, index: Indices) -> torch.Tensor:
        return torch.from_numpy(np.array(self.values[self.rows[index]]))


@dataclass(frozen=True)
class ImageExamples(ArrayExamples):
    """Pixels: ``values`` is [m, channels, height, width]."""

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """``pixel_values``, float32 [b, channels, height, width], copied out of ``values``."""
        return {"pixel_values": self._taken(index)}


@dataclass(frozen=True)
class AudioExamples(ArrayExamples):
    """Recordings padded to one length: samples [m, samples] or a spectrogram [m, bands, frames].

    The model calls them ``name``. Where it is told what is padding, ``filled`` int64 [m] says how
    many samples are not.
    """

    name: str = "input_values"
    filled: Indices | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over values and padding, example by example."""
        filled = self.filled if self.filled is not None else np.empty(0, np.int64)
        taken = filled[self.rows] if len(filled) else filled
        return _digest(self.name, taken, *(self.values[row] for row in self.rows))

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """``name``, float32 [b, ...], and perhaps ``attention_mask``, int64 [b, samples]."""
        inputs = {self.name: self._taken(index)}
        if self.filled is not None:
            mask = np.arange(self.values.shape[1]) < self.filled[self.rows[index]][:, None]
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return inputs


def concatenate(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts, which must come from one processor, in order, without groups."""
    first = parts[0]
    if hasattr(first, "joined"):
        joined: Examples = first.joined(parts[1:])
        return joined
    taught = [part.taught for part in parts if part.taught is not None]
    kept: dict[str, Any] = {"groups": None, "taught": np.concatenate(taught) if taught else None}
    texts = [part for part in parts if isinstance(part, TextExamples)]
    if len(texts) == len(parts):
        offsets = np.cumsum([0, *(len(part.ids) for part in texts)])
        types = [part.types for part in texts if part.types is not None]
        return replace(
            texts[0],
            labels=np.concatenate([part.labels for part in texts]),
            ids=np.concatenate([part.ids for part in texts]),
            starts=np.concatenate([p.starts + o for p, o in zip(texts, offsets, strict=False)]),
            lengths=np.concatenate([part.lengths for part in texts]),
            types=np.concatenate(types) if types else None,
            **kept,
        )
    arrays = [part for part in parts if isinstance(part, ArrayExamples)]
    labels = np.concatenate([part.labels for part in arrays])
    whole: dict[str, Any] = {
        "labels": labels,
        "values": np.concatenate([part.values[part.rows] for part in arrays]),
        "rows": np.arange(len(labels)),
        **kept,
    }
    heard = [part for part in parts if isinstance(part, AudioExamples)]
    lengths = [part.filled[part.rows] for part in heard if part.filled is not None]
    if lengths:
        whole["filled"] = np.concatenate(lengths)
    return replace(arrays[0], **whole)


def _source(starts: Indices, lengths: Indices) -> Indices:
    """Where each token of some examples lies: its example's start, counted upwards."""
    before = np.cumsum(lengths) - lengths
    source: Indices = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return source


def _digest(facts: str, *arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256(facts.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _padded(values: NDArray[Any], mask: NDArray[np.bool_], fill: int) -> torch.Tensor:
    grid = np.full(mask.shape, fill, dtype=np.int64)
    grid[mask] = values
    return torch.from_numpy(grid)
