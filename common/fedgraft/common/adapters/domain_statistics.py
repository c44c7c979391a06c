"""The statistics of domain adaptation: tensors that travel beside the adapter.

Domain adaptation trains with sites that have no labels. The tensors travel, are masked and are
averaged like the adapter. So the coordinator learns only the mean over each group of sites
(``source`` with labels, ``target`` without labels). A site fills the slots of its own group and
sends zeros for the other group. ``seen`` is the share of sites that filled a slot; a sum divided by
it gives the mean of the group.

Features have length one (``client/training/domain_adaptation.py``), and all values are scaled by
``SCALE`` before sending. So no value exceeds the clip of secure aggregation.
"""

from math import sqrt

import numpy as np
import torch
from torch import nn

from fedgraft.common.backbones.load import head_names
from fedgraft.common.config.training import DomainAdaptation
from fedgraft.common.errors import BackboneError
from fedgraft.common.layout import DOMAIN, Layout, Vector
from fedgraft.common.seeds import torch_generator

__all__ = ["GROUPS", "domain_tensors", "feature_size", "frequencies"]

GROUPS = ("source", "target")


def feature_size(model: nn.Module) -> int:
    """Return the number of inputs of a transformers model's head.

    Raises:
        BackboneError: the head has no linear layer.
    """
    for name in head_names(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                return module.in_features
    raise BackboneError(
        "training.domain: the head of this backbone has no linear layer",
        hint="another backbone, or no training.domain",
    )


def domain_tensors(settings: DomainAdaptation, size: int, seed: int) -> tuple[Layout, Vector]:
    """Return the layout and the initial values of the tensors beside an adapter.

    ``size`` is the number of values of a feature.
    """
    if settings.kind == "dann":
        return _discriminator(size, settings.hidden, seed)
    slots: dict[str, tuple[int, ...]] = {"mean": (size,), "second": (size, size), "seen": (1,)}
    if settings.kind == "mmd":
        slots = {"embedding": (settings.components,), "seen": (1,)}
    names = tuple(f"{DOMAIN}{group}.{slot}" for group in GROUPS for slot in slots)
    layout = Layout(names, tuple(slots.values()) * len(GROUPS))
    return layout, np.zeros(layout.size, np.float32)


def _discriminator(size: int, hidden: int, seed: int) -> tuple[Layout, Vector]:
    """Return two layers that distinguish the features of the groups, drawn from the job's seed."""
    shapes = {"first.weight": (hidden, size), "first.bias": (hidden,),
              "second.weight": (1, hidden), "second.bias": (1,)}  # fmt: skip
    generator = torch_generator(seed, "domain")
    parts = []
    for name, shape in shapes.items():
        bound = 1 / sqrt(size if name.startswith("first") else hidden)
        drawn = torch.rand(shape, generator=generator) * 2 - 1
        parts.append((drawn * bound).numpy().astype(np.float32).reshape(-1))
    layout = Layout(tuple(f"{DOMAIN}{name}" for name in shapes), tuple(shapes.values()))
    return layout, np.concatenate(parts)


def frequencies(size: int, components: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random Fourier features of a mixture of Gaussian kernels.

    They are weights [size, m] and phases [m] (Rahimi and Recht 2007, "Random Features for
    Large-Scale Kernel Machines"). Unrelated features of length one have the distance sqrt(2), and
    half of its square is 1. The squared widths are 1/4 to 4 times this value.
    """
    generator = torch_generator(seed, "domain")
    weights = torch.randn(size, components, generator=generator)
    squared = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    phases = torch.rand(components, generator=generator) * 2 * torch.pi
    return weights / squared[torch.arange(components) % len(squared)].sqrt(), phases
