"""The changes of the model's modules in training: norms of the change of the weights.

For a module with low-rank factors, the change is ``dW = scaling * B A`` (Hu et al. 2021, "LoRA:
Low-Rank Adaptation of Large Language Models", arXiv:2106.09685). The separate norms of A and B have
no meaning, because infinitely many pairs of factors have the same product. For all other trained
weights, the change is the difference from the start. Norms are Frobenius norms. They are relative
to the norm of the weights, so that large and small modules can be compared.

A large change does not mean that a module is important: it shows the effect of this training, not
what the model relies on.
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
    """One module: the norm of its ``change``, and the norm ``relative`` to that of its start.

    ``relative`` is None if the module started at zero. ``low_rank`` is True if the module trained
    low-rank factors.
    """

    module: str
    change: float
    relative: float | None
    low_rank: bool

    def to_json(self) -> dict[str, Any]:
        """Return the change as plain JSON values."""
        return asdict(self)


@torch.no_grad()
def moved_modules(bench: Workbench, *parts: tuple[Layout, Vector]) -> list[WeightChange]:
    """Return the change of every trained module, for an adapter of its start with ``parts``.

    Later parts replace earlier ones. Modules whose factors B stay at the sites are left out,
    because their change differs between sites.
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
    """Return the change of the weights ``base`` by merging; DoRA also rescales each row."""
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
    """Return the changes of modules without factors; a module's parameters count together."""
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
