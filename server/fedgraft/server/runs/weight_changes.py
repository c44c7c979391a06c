"""Which parts of the model training moved, and how far: norms of what is added to the weights.

Of a module with low-rank factors that is ``dW = scaling * B A`` (Hu et al. 2021, "LoRA: Low-Rank
Adaptation of Large Language Models", arXiv:2106.09685), not the norms of A and B, which say nothing
apart: the same product has infinitely many pairs of them. Of anything else that trains it is the
difference from where it started. Norms are Frobenius norms, and relative to that of the weights, so
that large and small modules can be compared.

A large change is not importance: it says where this training went, not what the model relies on.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.layout import OUTER, Layout, Vector, is_factor_b

__all__ = ["WeightChange", "moved_modules"]

ADAPTER = "default"
KEPT = ".modules_to_save.default"


@dataclass(frozen=True)
class WeightChange:
    """One module: the norm of its change, and that divided by the norm of where it started.

    ``relative`` is None where it started at zero. ``low_rank`` says that factors trained here.
    """

    module: str
    change: float
    relative: float | None
    low_rank: bool

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@torch.no_grad()
def moved_modules(bench: Workbench, *parts: tuple[Layout, Vector]) -> list[WeightChange]:
    """How far every trained module moved if the adapter is ``parts`` over its start, in order.

    Of pairs of which the sites keep one factor there is no change that is everybody's.
    """
    bench.put(*parts)
    found, shared = [], not any(map(is_factor_b, bench.own))
    for name, module in bench.model.named_modules():
        if shared and isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            base = module.get_base_layer().weight
            change = _change(module, base)
            found.append(_weight_change(name, _norm(change), _norm(base), low_rank=True))
    vector = bench.layout.merged(bench.initial, *parts)
    layout = bench.layout.of_model
    start, end = (bench.layout.part(one, layout) for one in (bench.initial, vector))
    return found + _moved_weights(layout, start, end)


def _change(module: LoraLayer, base: torch.Tensor) -> torch.Tensor:
    """What merging adds to the weights ``base``: with DoRA not only the product of the factors."""
    added: torch.Tensor = module.get_delta_weight(ADAPTER)
    if ADAPTER not in module.lora_magnitude_vector:
        return added
    magnitude = module.lora_magnitude_vector[ADAPTER].weight.flatten()
    turned, transposed = base + added, isinstance(module.get_base_layer(), Conv1D)
    rows = turned.T if transposed else turned.flatten(1)
    scaled = (magnitude / rows.norm(dim=1))[:, None] * rows
    change: torch.Tensor = (scaled.T if transposed else scaled.view_as(base)) - base
    return change


def _moved_weights(layout: Layout, start: Vector, end: Vector) -> list[WeightChange]:
    """Modules whose weights themselves train, a module's parameters taken together."""
    squares: dict[str, list[float]] = {}
    for name, where in layout.slices.items():
        if ".lora_" in name:
            continue
        before, after = (vector[where].astype(np.float64) for vector in (start, end))
        of_module = squares.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        of_module[0] += float(((after - before) ** 2).sum())
        of_module[1] += float((before**2).sum())
    return [
        _weight_change(name, change**0.5, base**0.5, low_rank=False)
        for name, (change, base) in squares.items()
    ]


def _weight_change(name: str, change: float, base: float, *, low_rank: bool) -> WeightChange:
    named = name.removeprefix(OUTER).replace(KEPT, "")
    return WeightChange(named, change, change / base if base else None, low_rank)


def _norm(weights: torch.Tensor) -> float:
    return float(weights.detach().to("cpu", torch.float64).norm())
