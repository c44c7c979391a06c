"""What adapting to sites without labels adds to a job: tensors of statistics beside the adapter.

They travel, are masked and are averaged like everything else, so that a coordinator learns of each
group of sites (``source`` with labels, ``target`` without) no more than the mean over it. A site
fills the slots of its own group and leaves zeros in the other's; ``seen``, the share that filled a
slot, makes means out of that.

Features have length one (``client.domain``), and all that is sent is scaled by ``SCALE``: no value
exceeds what secure aggregation clips at.
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
    """How many numbers enter the head of a model of transformers.

    Raises:
        BackboneError: its head has no linear layer.
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
    """What travels beside an adapter for features of ``size`` numbers, and what it starts from."""
    if settings.kind == "dann":
        return _discriminator(size, settings.hidden, seed)
    slots: dict[str, tuple[int, ...]] = {"mean": (size,), "second": (size, size), "seen": (1,)}
    if settings.kind == "mmd":
        slots = {"embedding": (settings.components,), "seen": (1,)}
    names = tuple(f"{DOMAIN}{group}.{slot}" for group in GROUPS for slot in slots)
    layout = Layout(names, tuple(slots.values()) * len(GROUPS))
    return layout, np.zeros(layout.size, np.float32)


def _discriminator(size: int, hidden: int, seed: int) -> tuple[Layout, Vector]:
    """Two layers that tell one group's features from the other's, drawn from the job's seed."""
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
    """Random Fourier features of a mixture of Gaussian kernels: weights [size, m], phases [m].

    Rahimi and Recht 2007, "Random Features for Large-Scale Kernel Machines". Unrelated features of
    length one are sqrt(2) apart; squared widths lie from 1/4 to 4 times half of its square.
    """
    generator = torch_generator(seed, "domain")
    weights = torch.randn(size, components, generator=generator)
    squared = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    phases = torch.rand(components, generator=generator) * 2 * torch.pi
    return weights / squared[torch.arange(components) % len(squared)].sqrt(), phases
