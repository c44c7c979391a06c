"""Encoded rows, ready to be cut into batches: what training and evaluation see of a site's data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Examples", "ImageExamples", "Indices", "TextExamples", "concatenate"]

Indices = NDArray[np.int64]


class Examples(Protocol):
    """Encoded rows: ``labels`` int64 [n], and any batch of them as inputs of the model."""

    @property
    def labels(self) -> Indices:
        """Index into the job's labels, per example."""

    def __len__(self) -> int:
        """The number of examples."""

    def batch(self, index: Indices) -> dict[str, torch.Tensor]:
        """The model's inputs (without labels) for the examples at ``index``, in that order."""

    def subset(self, index: Indices) -> Self:
        """The examples at ``index``, in that order; shares the encoded rows."""


@dataclass(frozen=True)
class TextExamples:
    """Token ids without padding: example i is ``ids[starts[i]:starts[i] + lengths[i]]``.

    ``labels``, ``starts`` and ``lengths`` int64 [n], ``ids`` int32 [tokens], ``types`` int8
    [tokens] only where the tokenizer gives token types.
    """

    labels: Indices
    ids: NDArray[np.int32]
    starts: Indices
    lengths: Indices
    types: NDArray[np.int8] | None
    pad_id: int
    pad_left: bool

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Indices) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` (``token_type_ids``), int64 [b, longest of them]."""
        starts, lengths = self.starts[index], self.lengths[index]
        width = int(lengths.max(initial=0))
        positions = np.arange(width)
        if self.pad_left:
            mask = positions >= (width - lengths)[:, None]
        else:
            mask = positions < lengths[:, None]
        # Where each token of the batch lies in ids: its example's start, counted upwards.
        before = np.cumsum(lengths) - lengths
        source = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
        inputs = {"input_ids": _padded(self.ids[source], mask, self.pad_id)}
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self.types is not None:
            inputs["token_type_ids"] = _padded(self.types[source], mask, 0)
        return inputs

    def subset(self, index: Indices) -> "TextExamples":
        """The examples at ``index``, in that order; the token ids are shared."""
        return replace(
            self,
            labels=self.labels[index],
            starts=self.starts[index],
            lengths=self.lengths[index],
        )


@dataclass(frozen=True)
class ImageExamples:
    """``labels`` int64 [n]; example i is ``pixels[rows[i]]``.

    ``pixels`` is float32 [m, channels, height, width], in memory or mapped from a file.
    """

    labels: Indices
    pixels: NDArray[np.float32]
    rows: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Indices) -> dict[str, torch.Tensor]:
        """``pixel_values``, float32 [b, channels, height, width], copied out of ``pixels``."""
        return {"pixel_values": torch.from_numpy(np.array(self.pixels[self.rows[index]]))}

    def subset(self, index: Indices) -> "ImageExamples":
        """The examples at ``index``, in that order; the pixels are shared."""
        return replace(self, labels=self.labels[index], rows=self.rows[index])


def concatenate(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts, which must come from one processor, in order."""
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
        )
    images = [part for part in parts if isinstance(part, ImageExamples)]
    pixels = np.concatenate([part.pixels[part.rows] for part in images])
    labels = np.concatenate([part.labels for part in images])
    return ImageExamples(labels, pixels, np.arange(len(labels)))


def _padded(values: NDArray[Any], mask: NDArray[np.bool_], fill: int) -> torch.Tensor:
    grid = np.full(mask.shape, fill, dtype=np.int64)
    grid[mask] = values
    return torch.from_numpy(grid)
