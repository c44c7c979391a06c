"""Encoded rows, ready to be cut into batches: a site's data for training and evaluation.

All code here uses NumPy only: a job is read, and rows are encoded, without PyTorch.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AT_ONCE",
    "IGNORED",
    "OUTPUTS",
    "ArrayExamples",
    "AudioExamples",
    "Examples",
    "ImageExamples",
    "Indices",
    "Inputs",
    "Teachable",
    "TextExamples",
    "concatenate",
    "count_documents",
    "has_labels",
]

AT_ONCE = 64  # examples that are evaluated in one pass, if outputs do not say otherwise
OUTPUTS = 1 << 25  # values that a model predicts in one pass of an evaluation, 128 MB
IGNORED = -100  # no target: padding, or a position without a next token
Indices = NDArray[np.int64]
Inputs = dict[str, NDArray[Any]]
"""A batch as the model reads it: an array [b, ...] for each argument, by its name."""


class Examples(Protocol):
    """Encoded rows: ``labels`` int64 [n], and any batch of them as inputs of the model."""

    @property
    def labels(self) -> Indices:
        """Return the index into the job's labels for each example."""

    @property
    def groups(self) -> Indices | None:
        """Return the index into the job's groups for each example, -1 for none.

        None if the job has no groups.
        """

    @property
    def teacher_logits(self) -> NDArray[np.float32] | None:
        """Return a teacher's logits, float32 [n, classes]; None without a teacher."""

    @property
    def lengths(self) -> Indices:
        """Return the tokens of each example; zeros if examples are not sequences."""

    @property
    def longest(self) -> int:
        """Return the most tokens of an example; 0 if examples are not sequences."""

    @property
    def pad_left(self) -> bool:
        """Return whether padding is before the tokens."""

    @property
    def digest(self) -> str:
        """Return the SHA-256 over all inputs of the model, in order, without labels."""

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory; parts shared with other examples count fully."""

    @property
    def target_count(self) -> int:
        """Return the number of targets of all examples: their loss is a mean over targets.

        It is the number of examples if each has one label, else for example of tokens to predict.
        It is the site's weight in the mean of updates.
        """

    @property
    def documents(self) -> Indices:
        """Return the number of the document of each example, int64 [n].

        Blocks of one text are of one document, and depend on one another. Other examples are
        documents of their own.
        """

    def __len__(self) -> int:
        """Return the number of examples."""

    def width(self, index: Indices) -> int:
        """Return the tokens of a batch of the examples at ``index``; 0 if not sequences."""

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return the model's inputs (without labels) for the examples at ``index``, in order.

        Sequences are padded to ``width`` tokens, or by default to ``width(index)``.
        """

    def targets(self, index: Indices, width: int = 0) -> NDArray[Any]:
        """Return the model's targets for ``batch(index, width)``, int64 [b] or [b, width]."""

    def subset(self, index: Indices) -> Self:
        """Return the examples at ``index``, in that order; the encoded rows are shared."""

    def with_teacher(self, logits: NDArray[np.float32]) -> Self:
        """Return the same examples with these ``teacher_logits``."""

    def with_groups(self, groups: Indices) -> Self:
        """Return the same examples with these ``groups``, int64 [n]."""

    def padded_right(self) -> Self:
        """Return the same examples with padding after the tokens."""

    def joined(self, others: "Sequence[Self]") -> Self:
        """Return these and ``others`` (of one processor), in order, without groups."""


E = TypeVar("E", bound=Examples)


@dataclass(frozen=True)
class Teachable(ABC):
    """A base for examples that can have a teacher's logits for each example."""

    teacher_logits: NDArray[np.float32] | None = field(default=None, kw_only=True)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @property
    def target_count(self) -> int:
        """Return the number of examples: each has one target."""
        return len(self)

    @property
    def documents(self) -> Indices:
        """Return 0 to n - 1: each example is a document of its own."""
        return np.arange(len(self))

    def padded_right(self) -> Self:
        """Return the same examples with padding after the tokens."""
        return replace(self, pad_left=False)  # type: ignore[call-arg]  # children have it

    def with_teacher(self, logits: NDArray[np.float32]) -> Self:
        """Return the same examples with these ``teacher_logits``."""
        return replace(self, teacher_logits=logits)

    def with_groups(self, groups: Indices) -> Self:
        """Return the same examples with these ``groups``."""
        return replace(self, groups=groups)  # type: ignore[call-arg]  # children have groups


@dataclass(frozen=True)
class TextExamples(Teachable):
    """Token ids without padding: example i is ``ids[starts[i]:starts[i] + lengths[i]]``.

    ``labels``, ``starts`` and ``lengths`` are int64 [n], ``ids`` int32 [tokens], ``types`` int8
    [tokens] if the tokenizer has token types, else None. No example is longer than ``longest``.
    """

    labels: Indices
    ids: NDArray[np.int32]
    starts: Indices
    lengths: Indices
    types: NDArray[np.int8] | None
    pad_id: int
    pad_left: bool
    longest: int
    groups: Indices | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 over token ids, types and padding, example by example."""
        source = _source(self.starts, self.lengths)
        parts: list[NDArray[Any]] = [self.lengths, self.ids[source]]
        if self.types is not None:
            parts.append(self.types[source])
        return _digest(f"{self.pad_id} {self.pad_left} {self.longest}", *parts)

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        arrays = (self.labels, self.ids, self.starts, self.lengths)
        return sum(a.nbytes for a in arrays) + (self.types.nbytes if self.types is not None else 0)

    def width(self, index: Indices) -> int:
        """Return the length of the longest example at ``index``."""
        return int(self.lengths[index].max(initial=0))

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return ``input_ids``, ``attention_mask`` (``token_type_ids``), int64 [b, width]."""
        starts, lengths = self.starts[index], self.lengths[index]
        width = width or self.width(index)
        positions = np.arange(width)
        if self.pad_left:
            mask = positions >= (width - lengths)[:, None]
        else:
            mask = positions < lengths[:, None]
        source = _source(starts, lengths)
        inputs = {"input_ids": _padded(self.ids[source], mask, self.pad_id)}
        inputs["attention_mask"] = mask.astype(np.int64)
        if self.types is not None:
            inputs["token_type_ids"] = _padded(self.types[source], mask, 0)
        return inputs

    def targets(self, index: Indices, width: int = 0) -> NDArray[Any]:
        """Return the labels, int64 [b]."""
        return self.labels[index]

    def subset(self, index: Indices) -> "TextExamples":
        """Return the examples at ``index``, in that order; the token ids are shared."""
        return replace(
            self,
            labels=self.labels[index],
            starts=self.starts[index],
            lengths=self.lengths[index],
            groups=None if self.groups is None else self.groups[index],
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
        )

    def joined(self, others: Sequence["TextExamples"]) -> "TextExamples":
        """Return these examples and those of ``others``, in order, without groups."""
        every = (self, *others)
        offsets = np.cumsum([0, *(len(part.ids) for part in every)])
        types = [part.types for part in every if part.types is not None]
        return replace(
            self,
            labels=np.concatenate([part.labels for part in every]),
            ids=np.concatenate([part.ids for part in every]),
            starts=np.concatenate([p.starts + o for p, o in zip(every, offsets, strict=False)]),
            lengths=np.concatenate([part.lengths for part in every]),
            types=np.concatenate(types) if types else None,
            groups=None,
            teacher_logits=_joined_logits(every),
        )


@dataclass(frozen=True)
class ArrayExamples(Teachable):
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
        """Return zeros: examples are not sequences, or all have the same padding."""
        return np.zeros(len(self.labels), np.int64)

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 over the values, example by example."""
        digest = hashlib.sha256(str(self.values.shape[1:]).encode())
        for row in self.rows:
            digest.update(np.ascontiguousarray(self.values[row]).data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory: values mapped from a file take none."""
        mapped = isinstance(self.values, np.memmap)
        return self.labels.nbytes + self.rows.nbytes + (0 if mapped else self.values.nbytes)

    def width(self, index: Indices) -> int:
        """Return 0: there are no sequences."""
        return 0

    def targets(self, index: Indices, width: int = 0) -> NDArray[Any]:
        """Return the labels, int64 [b]."""
        return self.labels[index]

    def subset(self, index: Indices) -> Self:
        """Return the examples at ``index``, in that order; the values are shared."""
        return replace(
            self,
            labels=self.labels[index],
            rows=self.rows[index],
            groups=None if self.groups is None else self.groups[index],
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
        )

    def joined(self, others: Sequence[Self]) -> Self:
        """Return these examples and those of ``others``, in order, without groups."""
        every = (self, *others)
        labels = np.concatenate([part.labels for part in every])
        return replace(
            self,
            labels=labels,
            values=np.concatenate([part.values[part.rows] for part in every]),
            rows=np.arange(len(labels)),
            groups=None,
            teacher_logits=_joined_logits(every),
        )

    def _taken(self, index: Indices) -> NDArray[Any]:
        return np.array(self.values[self.rows[index]])


@dataclass(frozen=True)
class ImageExamples(ArrayExamples):
    """Pixels: ``values`` is [m, channels, height, width]."""

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return ``pixel_values``, float32 [b, channels, height, width], a copy of ``values``."""
        return {"pixel_values": self._taken(index)}


@dataclass(frozen=True)
class AudioExamples(ArrayExamples):
    """Recordings padded to one length: samples [m, samples] or a spectrogram [m, bands, frames].

    ``name`` is the model's name for them. If the model gets a mask of the padding, ``filled``,
    int64 [m], is the number of samples that are not padding.
    """

    name: str = "input_values"
    filled: Indices | None = None

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 over values and padding, example by example."""
        filled = self.filled if self.filled is not None else np.empty(0, np.int64)
        taken = filled[self.rows] if len(filled) else filled
        return _digest(self.name, taken, *(self.values[row] for row in self.rows))

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return ``name``, float32 [b, ...], and maybe ``attention_mask``, int64 [b, samples]."""
        inputs = {self.name: self._taken(index)}
        if self.filled is not None:
            mask = np.arange(self.values.shape[1]) < self.filled[self.rows[index]][:, None]
            inputs["attention_mask"] = mask.astype(np.int64)
        return inputs

    def joined(self, others: "Sequence[Self]") -> Self:
        """Return these recordings and those of ``others``, in order, without groups."""
        whole = super().joined(others)
        lengths = [p.filled[p.rows] for p in (self, *others) if p.filled is not None]
        return replace(whole, filled=np.concatenate(lengths)) if lengths else whole


def concatenate(parts: Sequence[E]) -> E:
    """Return the examples of all parts (of one processor), in order, without groups."""
    return parts[0].joined(parts[1:])


def count_documents(examples: Examples) -> int:
    """Return the number of documents: a text counts once, in however many blocks it is read."""
    return len(np.unique(examples.documents))


def has_labels(examples: Examples) -> bool:
    """Return whether these are the examples of a labelled site."""
    return not len(examples) or bool((examples.labels != IGNORED).any())


def _joined_logits(parts: Sequence[Any]) -> NDArray[np.float32] | None:
    logits = [part.teacher_logits for part in parts if part.teacher_logits is not None]
    return np.concatenate(logits) if logits else None


def _source(starts: Indices, lengths: Indices) -> Indices:
    """Return the place of each token of some examples: its example's start, counted upwards."""
    before = np.cumsum(lengths) - lengths
    source: Indices = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return source


def _digest(facts: str, *arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256(facts.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _padded(values: NDArray[Any], mask: NDArray[np.bool_], fill: int) -> NDArray[Any]:
    grid = np.full(mask.shape, fill, dtype=np.int64)
    grid[mask] = values
    return grid
