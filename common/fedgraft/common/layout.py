"""The named layout of an adapter vector: which tensor lies where, and which kind of tensor it is.

An adapter is one flat float32 vector. What crosses the network is that vector, and its meaning is
agreed by the fingerprint of the layout.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.errors import AdapterError

__all__ = [
    "BESIDE",
    "DOMAIN",
    "EWC",
    "OUTER",
    "TIMM_HEADS",
    "TIMM_MODEL",
    "Layout",
    "Vector",
    "cut_rank",
    "is_factor_a",
    "is_factor_b",
    "is_head",
]

Vector = NDArray[np.float32]

# Before the names of what travels beside an adapter: ``domain.py``, ``consolidation.py``.
BESIDE = (DOMAIN, EWC) = ("domain.", "ewc.")
OUTER = "base_model.model."  # what peft puts before the names of the backbone's modules

TIMM_MODEL = "timm_model"  # what transformers' wrapper calls the model of timm
TIMM_HEADS = frozenset(
    f"{TIMM_MODEL}.{name}"
    for name in ("classif", "classifier", "fc", "head", "head.fc", "head.fc2", "head.l",
                 "head.linear", "head_dist", "last_linear")
)  # fmt: skip
"""Where timm's models have their classifiers: a tensor is told to be a head's by its name."""


@dataclass(frozen=True)
class Layout:
    """Which parameter lies where in an adapter vector: names, shapes, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each name lies."""
        ends = list(accumulate(prod(shape) for shape in self.shapes))
        starts = [0, *ends][: len(ends)]
        return {n: slice(a, b) for n, a, b in zip(self.names, starts, ends, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over names and shapes in order."""
        lines = (f"{name} {shape}\n" for name, shape in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def only(self, names: Iterable[str]) -> "Layout":
        """The layout of some of the names, in this layout's order.

        Raises:
            AdapterError: a name is not in this layout.
        """
        wanted = set(names)
        if unknown := wanted.difference(self.names):
            raise AdapterError(
                f"{len(unknown)} adapter tensors are unknown here, such as {min(unknown)}",
                hint="coordinator and site must use the same job, backbone and peft version",
            )
        kept = [pair for pair in zip(self.names, self.shapes, strict=True) if pair[0] in wanted]
        return Layout(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    def part(self, vector: Vector, other: "Layout") -> Vector:
        """What ``vector``, float32 [size], holds of ``other``'s tensors, which are all in here."""
        pieces = [vector[self.slices[name]] for name in other.names]
        return np.concatenate([np.empty(0, np.float32), *pieces])

    def merged(self, vector: Vector, *parts: "tuple[Layout, Vector]") -> Vector:
        """``vector``, float32 [size], with the tensors of each part written over it in order.

        Raises:
            AdapterError: a part has another length or dtype than its layout says.
        """
        merged = vector.copy()
        for layout, values in parts:
            layout.check(values)
            for name, where in layout.slices.items():
                merged[self.slices[name]] = values[where]
        return merged

    @property
    def of_model(self) -> "Layout":
        """Without what only travels beside an adapter."""
        return self.only(name for name in self.names if not name.startswith(BESIDE))

    def joined(self, other: "Layout") -> "Layout":
        """This layout with another behind it."""
        return Layout((*self.names, *other.names), (*self.shapes, *other.shapes))

    def check(self, vector: Vector) -> None:
        """Check that ``vector`` is float32 [size].

        Raises:
            AdapterError: it is not.
        """
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise AdapterError(
                f"adapter vector is {vector.dtype} {list(vector.shape)}, not float32 [{self.size}]",
                hint="it belongs to another job or backbone",
            )


def is_head(name: str) -> bool:
    """Whether an adapter tensor belongs to the task's head.

    That is a module of the outermost level, or one of timm's heads, which are further inside.
    """
    module, kept, _ = name.partition(".modules_to_save.")
    path = module.removeprefix(OUTER)
    return bool(kept) and ("." not in path or path in TIMM_HEADS)


def is_factor_a(name: str) -> bool:
    """Whether an adapter tensor is a LoRA factor A (rank x inputs)."""
    return ".lora_A." in name


def is_factor_b(name: str) -> bool:
    """Whether an adapter tensor is a LoRA factor B (outputs x rank)."""
    return ".lora_B." in name


def cut_rank(layout: Layout, vector: Vector, rank: int) -> Vector:
    """``vector`` with only the first ``rank`` components of every low-rank path, float32.

    The rest of A's rows and B's columns is zero, and stays so in training: the gradient of one has
    the other as a factor. Sites of different ranks truncate what they receive like this in Cho et
    al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models".
    """
    cut = vector.copy()
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        values = cut[where].reshape(shape)
        if is_factor_a(name):
            values[rank:] = 0
        elif is_factor_b(name):
            values[:, rank:] = 0
    return cut
