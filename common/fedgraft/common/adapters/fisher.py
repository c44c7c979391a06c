"""What elastic weight consolidation adds to a job: which values of an adapter mattered, and where.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks": training on new
data is held, value by value, to where it was after the old, by how much the old data's loss depends
on it: the diagonal of the Fisher information. Online as in Schwarz et al. 2018, "Progress &
Compress": what old and new data depend on is added up.

Sites measure on their own data, and the mean over sites travels beside the adapter like everything
else: ``ewc.new``. A job that continues an earlier one also hands out that one's Fisher information
and adapter, ``ewc.old`` and ``ewc.anchor``. Each has one value for each value of the adapter that
travels.
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
    """What travels beside the tensors ``carried``, and zeros to start from."""
    names = (NEW, OLD, ANCHOR) if settings.weight else (NEW,)
    layout = Layout(names, ((carried.size,),) * len(names))
    return layout, np.zeros(layout.size, np.float32)


def fisher_of(layout: Layout, vector: Vector) -> Vector:
    """The Fisher information of all data so far, float32 [carried size]."""
    found: Vector = vector[layout.slices[NEW]] / np.float32(SCALE)
    return found + vector[layout.slices[OLD]] if OLD in layout.slices else found


def save_fisher(folder: Path, carried: Layout, fisher: Vector) -> None:
    """Write it beside an adapter's weights, tensor by tensor."""
    shapes = zip(carried.slices.items(), carried.shapes, strict=True)
    arrays: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(fisher[where].reshape(shape)) for (name, where), shape in shapes
    }
    save_file(arrays, folder / FILE)


def load_fisher(folder: Path, carried: Layout) -> Vector:
    """What ``save_fisher`` wrote to ``folder``, float32 [carried.size].

    Raises:
        InputError: there is none, or it is of another adapter.
    """
    try:
        arrays = load_file(folder / FILE)
        parts = [arrays[name] for name in carried.names]
    except Exception as error:  # torn files raise many kinds
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
