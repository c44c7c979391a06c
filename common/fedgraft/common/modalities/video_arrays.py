"""Encode a site's clips once, for all rounds: some frames of each, as images of one size."""

import hashlib
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store, filled_array
from fedgraft.common.config.job import Job
from fedgraft.common.examples import ImageExamples, Indices
from fedgraft.common.modalities.video import VideoProcessor, open_clip

__all__ = ["encode_clips"]


def encode_clips(
    dataset: datasets.Dataset,
    labels: Indices,
    processor: VideoProcessor,
    job: Job,
    *,
    store: Store | None,
    key: str,
) -> ImageExamples:
    """The column ``video`` of a data set as ``pixel_values`` [n, frames, channels, height, width].

    ``key`` names the contents and the backbone: with it what was made before is found in ``store``.

    Raises:
        DataError: a clip changed since it was read.
    """
    shape, normalize = (len(labels), *processor.shape), job.data.normalize
    sources = dataset.with_format("arrow")[:]["video"].to_pylist()

    def fill(values: NDArray[Any]) -> None:
        for at, source in enumerate(sources):
            values[at] = processor.pixels(open_clip(source, processor.frames), normalize)

    def name() -> str:
        parts = f"{key}\n{processor.identity}\n{normalize}"
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    values = filled_array(store, shape, fill, name)
    return ImageExamples(labels, values, np.arange(len(labels), dtype=np.int64))
