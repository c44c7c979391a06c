"""Encoded rows, ready to be cut into batches: what training and evaluation see of a site's data.

Everything here is NumPy: a job is read, and rows are encoded, without PyTorch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "IGNORED",
    "ArrayExamples",
    "AudioExamples",
    "Examples",
    "ImageExamples",
    "Indices",
    "Inputs",
    "TextExamples",
    "Wrapped",
    "concatenate",
    "has_labels",
]

IGNORED = -100  # a target that is none: padding, or a position after which nothing comes
Indices = NDArray[np.int64]
Inputs = dict[str, NDArray[Any]]
"""A batch as the model reads it: an array [b, ...] for each argument, by its name."""


class Examples(Protocol):
    """Encoded rows: ``labels`` int64 [n], and any batch of them as inputs of the model."""

    @property
    def labels(self) -> Indices:
        """Index into the job's labels, per example."""

    @property
    def groups(self) -> Indices | None:
        """Index into the job's groups, per example, -1 for none; None where it has no groups."""

    @property
    def teacher_logits(self) -> NDArray[np.float32] | None:
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

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """The model's inputs (without labels) for the examples at ``index``, in that order.

        Sequences are padded to ``width`` tokens, or as ``width(index)`` says.
        """

    def targets(self, index: Indices, width: int = 0) -> NDArray[Any]:
        """What the model should predict for ``batch(index, width)``, int64 [b] or [b, width]."""

    def subset(self, index: Indices) -> Self:
        """The examples at ``index``, in that order; shares the encoded rows."""

    def with_teacher(self, logits: NDArray[np.float32]) -> Self:
        """The same examples with these ``teacher_logits``."""

    def with_groups(self, groups: Indices) -> Self:
        """The same examples with these ``groups``, int64 [n]."""

    def joined(self, others: "Sequence[Self]") -> Self:
        """These examples and those of ``others`` (of one processor), in order, without groups."""


E = TypeVar("E", bound=Examples)


@dataclass(frozen=True)
class _Teachable:
    """A base for examples: a teacher may have given logits for each."""

    teacher_logits: NDArray[np.float32] | None = field(default=None, kw_only=True)

    def with_teacher(self, logits: NDArray[np.float32]) -> Self:
        """The same examples with these ``teacher_logits``."""
        return replace(self, teacher_logits=logits)

    def with_groups(self, groups: Indices) -> Self:
        """The same examples with these ``groups``."""
        return replace(self, groups=groups)  # type: ignore[call-arg]  # where a child has them


@dataclass(frozen=True)
class TextExamples(_Teachable):
    """Token ids without padding: example i is ``ids[starts[i]:starts[i] + lengths[i]]``.

    ``labels``, ``starts`` and ``lengths`` int64 [n], ``ids`` int32 [tokens], ``types`` int8
    [tokens] only where the tokenizer gives token types. None is longer than ``longest``.
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

    def batch(self, index: Indices, width: int = 0) -> Inputs:
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
        inputs["attention_mask"] = mask.astype(np.int64)
        if self.types is not None:
            inputs["token_type_ids"] = _padded(self.types[source], mask, 0)
        return inputs

    def targets(self, index: Indices, width: int = 0) -> NDArray[Any]:
        """The labels, int64 [b]."""
        return self.labels[index]

    def subset(self, index: Indices) -> "TextExamples":
        """The examples at ``index``, in that order; the token ids are shared."""
        return replace(
            self,
            labels=self.labels[index],
            starts=self.starts[index],
            lengths=self.lengths[index],
            groups=None if self.groups is None else self.groups[index],
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
        )

    def joined(self, others: Sequence["TextExamples"]) -> "TextExamples":
        """These examples and those of ``others``, in order, without groups."""
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
class Wrapped(_Teachable):
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
class ArrayExamples(_Teachable):
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

    def targets(self, index: Indices, width: int = 0) -> NDArray[Any]:
        """The labels, int64 [b]."""
        return self.labels[index]

    def subset(self, index: Indices) -> Self:
        """The examples at ``index``, in that order; the values are shared."""
        return replace(
            self,
            labels=self.labels[index],
            rows=self.rows[index],
            groups=None if self.groups is None else self.groups[index],
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
        )

    def joined(self, others: Sequence[Self]) -> Self:
        """These examples and those of ``others``, in order, without groups."""
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

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """``name``, float32 [b, ...], and perhaps ``attention_mask``, int64 [b, samples]."""
        inputs = {self.name: self._taken(index)}
        if self.filled is not None:
            mask = np.arange(self.values.shape[1]) < self.filled[self.rows[index]][:, None]
            inputs["attention_mask"] = mask.astype(np.int64)
        return inputs

    def joined(self, others: "Sequence[Self]") -> Self:
        """These recordings and those of ``others``, in order, without groups."""
        whole = super().joined(others)
        lengths = [p.filled[p.rows] for p in (self, *others) if p.filled is not None]
        return replace(whole, filled=np.concatenate(lengths)) if lengths else whole


def concatenate(parts: Sequence[E]) -> E:
    """The examples of all parts, which must come from one processor, in order, without groups."""
    return parts[0].joined(parts[1:])


def has_labels(examples: Examples) -> bool:
    """Whether these are a labelled site's."""
    return not len(examples) or bool((examples.labels != IGNORED).any())


def _joined_logits(parts: Sequence[Any]) -> NDArray[np.float32] | None:
    logits = [part.teacher_logits for part in parts if part.teacher_logits is not None]
    return np.concatenate(logits) if logits else None


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


def _padded(values: NDArray[Any], mask: NDArray[np.bool_], fill: int) -> NDArray[Any]:
    grid = np.full(mask.shape, fill, dtype=np.int64)
    grid[mask] = values
    return grid
