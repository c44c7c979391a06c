"""The tensors of elastic weight consolidation (EWC): the importance of each value of an adapter.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks": training on new
data keeps each value close to its value after training on old data. The strength depends on the old
loss's sensitivity to the value: the diagonal of the Fisher information. Online EWC as in Schwarz et
al. 2018, "Progress & Compress": the Fisher information of old and new data is added.

Sites measure it on their own data. The mean over sites travels beside the adapter like the adapter
itself: ``ewc.new``. A job that continues an earlier job also sends the earlier Fisher information
and adapter to the sites: ``ewc.old`` and ``ewc.anchor``. Each tensor has one value for each adapter
value that travels.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.training import Consolidation
from fedgraft.common.errors import InputError
from fedgraft.common.layout import EWC, Layout, Vector

__all__ = [
    "ANCHOR",
    "NEW",
    "OLD",
    "consolidation_tensors",
    "fisher_of",
    "load_fisher",
    "save_fisher",
]

NEW, OLD, ANCHOR = (f"{EWC}{name}" for name in ("new", "old", "anchor"))
FILE = "fisher.safetensors"


def consolidation_tensors(settings: Consolidation, carried: Layout) -> tuple[Layout, Vector]:
    """Return the layout and the initial zeros of the tensors beside the exchanged ``carried``."""
    names = (NEW, OLD, ANCHOR) if settings.weight else (NEW,)
    layout = Layout(names, ((carried.size,),) * len(names))
    return layout, np.zeros(layout.size, np.float32)


def fisher_of(layout: Layout, vector: Vector) -> Vector:
    """Return the Fisher information of all data so far, float32 [carried size]."""
    found: Vector = vector[layout.slices[NEW]] / np.float32(SCALE)
    return found + vector[layout.slices[OLD]] if OLD in layout.slices else found


def save_fisher(folder: Path, carried: Layout, fisher: Vector) -> None:
    """Write the Fisher information beside an adapter's weights, tensor by tensor."""
    shapes = zip(carried.slices.items(), carried.shapes, strict=True)
    arrays: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(fisher[where].reshape(shape)) for (name, where), shape in shapes
    }
    save_file(arrays, folder / FILE)


def load_fisher(folder: Path, carried: Layout) -> Vector:
    """Return the Fisher information from ``save_fisher`` in ``folder``, float32 [carried.size].

    Raises:
        InputError: there is none, or it belongs to another adapter.
    """
    try:
        arrays = load_file(folder / FILE)
        parts = [arrays[name] for name in carried.names]
    except Exception as error:  # damaged files raise many kinds of error
        raise InputError(
            f"no Fisher information can be read from {folder} ({type(error).__name__})",
            hint="export a run whose job has [training.consolidation]",
        ) from None
    if tuple(part.shape for part in parts) != carried.shapes:
        raise InputError(
            f"the Fisher information in {folder} is of another adapter",
            hint="the same method, rank and targets as in the earlier job",
        )
    flat = [part.astype(np.float32).reshape(-1) for part in parts]
    return np.concatenate([np.empty(0, np.float32), *flat])
