"""The named layout of an adapter vector: the position and the kind of each tensor.

An adapter is one flat float32 vector. Coordinator and sites exchange this vector, and agree on its
meaning by the fingerprint of the layout.
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

# Name prefixes of tensors beside an adapter: ``adapters/domain_statistics.py``, ``fisher.py``.
BESIDE = (DOMAIN, EWC) = ("domain.", "ewc.")
OUTER = "base_model.model."  # peft's prefix of the backbone's module names

TIMM_MODEL = "timm_model"  # the name of the timm model in transformers' wrapper
TIMM_HEADS = frozenset(
    f"{TIMM_MODEL}.{name}"
    for name in ("classif", "classifier", "fc", "head", "head.fc", "head.fc2", "head.l",
                 "head.linear", "head_dist", "last_linear")
)  # fmt: skip
"""The places of classifiers in timm's models: a tensor's name shows that it belongs to a head."""


@dataclass(frozen=True)
class Layout:
    """The layout of an adapter vector: names and shapes of its parameters, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        """Return the length of the vector."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Return the slice of the vector for each name."""
        ends = list(accumulate(prod(shape) for shape in self.shapes))
        starts = [0, *ends][: len(ends)]
        return {n: slice(a, b) for n, a, b in zip(self.names, starts, ends, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) over names and shapes in order."""
        lines = (f"{name} {shape}\n" for name, shape in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def only(self, names: Iterable[str]) -> "Layout":
        """Return the layout of some of the names, in this layout's order.

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
        """Return the tensors of ``other`` from ``vector``, float32 [size].

        All of them must be in this layout.
        """
        pieces = [vector[self.slices[name]] for name in other.names]
        return np.concatenate([np.empty(0, np.float32), *pieces])

    def merged(self, vector: Vector, *parts: "tuple[Layout, Vector]") -> Vector:
        """Return ``vector``, float32 [size], with each part's tensors written over it in order.

        Raises:
            AdapterError: a part's length or dtype differs from its layout.
        """
        merged = vector.copy()
        for layout, values in parts:
            layout.check(values)
            for name, where in layout.slices.items():
                merged[self.slices[name]] = values[where]
        return merged

    @property
    def of_model(self) -> "Layout":
        """Return the layout without the tensors that only travel beside an adapter."""
        return self.only(name for name in self.names if not name.startswith(BESIDE))

    def joined(self, other: "Layout") -> "Layout":
        """Return this layout followed by another layout."""
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
    """Return whether an adapter tensor belongs to the task's head.

    The head is a module of the outermost level, or one of timm's heads, which are further inside.
    """
    module, kept, _ = name.partition(".modules_to_save.")
    path = module.removeprefix(OUTER)
    return bool(kept) and ("." not in path or path in TIMM_HEADS)


def is_factor_a(name: str) -> bool:
    """Return whether an adapter tensor is a LoRA factor A (rank x inputs)."""
    return ".lora_A." in name


def is_factor_b(name: str) -> bool:
    """Return whether an adapter tensor is a LoRA factor B (outputs x rank)."""
    return ".lora_B." in name


def cut_rank(layout: Layout, vector: Vector, rank: int) -> Vector:
    """Return ``vector`` with only the first ``rank`` components of every low-rank path, float32.

    The other rows of A and columns of B are zero. They stay zero in training, because the gradient
    of one has the other as a factor. Sites of different ranks truncate the received adapter in this
    way in Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
    Models".
    """
    cut = vector.copy()
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        values = cut[where].reshape(shape)
        if is_factor_a(name):
            values[rank:] = 0
        elif is_factor_b(name):
            values[:, rank:] = 0
    return cut
