"""Encode a site's recordings once, for all rounds: padded to one length, as images are to one size.

The arrays are kept in the site's cache where they are large. What a recording says can be heard
again from samples: the cache belongs to the site.
"""

import hashlib
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store, filled_array
from fedgraft.common.config.job import Job
from fedgraft.common.examples import AudioExamples, Indices
from fedgraft.common.modalities.audio import AudioProcessor, open_recording

__all__ = ["encode_recordings"]


def encode_recordings(
    dataset: datasets.Dataset,
    labels: Indices,
    processor: AudioProcessor,
    job: Job,
    *,
    store: Store | None,
    key: str,
) -> AudioExamples:
    """The column ``audio`` of a data set as what the backbone reads, with ``labels`` int64 [n].

    ``key`` names the contents and the backbone: with it what was made before is found in ``store``.

    Raises:
        BackboneError: ``data.seconds`` does not fit the backbone.
        DataError: a recording changed since it was read.
    """
    seconds = job.data.seconds
    shape = (len(labels), *processor.shape(seconds))
    sources = dataset.with_format("arrow")[:]["audio"].to_pylist()

    def fill(values: NDArray[Any]) -> None:
        for at, source in enumerate(sources):
            values[at] = processor.features([open_recording(source)], seconds)[0]

    def name() -> str:
        parts = f"{key}\n{processor.identity}\n{seconds}"
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    filled = None
    if processor.masked:
        found = [processor.filled(open_recording(source), seconds) for source in sources]
        filled = np.array(found, np.int64)
    values = filled_array(store, shape, fill, name)
    rows = np.arange(len(labels), dtype=np.int64)
    return AudioExamples(labels, values, rows, name=processor.name, filled=filled)
