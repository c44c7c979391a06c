"""All trainable parameters as one flat float32 vector with a named layout.

peft adds the low-rank factors and the trainable copy of the head to the model. This module lists
them in a fixed order. So coordinator and sites exchange one array, and a fingerprint of the layout
shows that both give it the same meaning.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fedgraft.common.backbones.blocks import blocks_in
from fedgraft.common.backbones.load import head_names
from fedgraft.common.config.job import Job
from fedgraft.common.layout import BESIDE, OUTER, Layout, Vector, is_factor_a, is_head
from fedgraft.common.methods import Anatomy
from fedgraft.common.seeds import derive_seed

__all__ = [
    "adapter_layout",
    "attach",
    "read",
    "write",
]


def attach(model: nn.Module, job: Job) -> PeftModel:
    """Add the job's adapter to ``model`` (in place) and return the peft model around it.

    Initial factors come from a seed that is a hash of the job's seed, so they are equal at every
    site.

    Raises:
        AdapterError: the targets match no module of the model, or it has fewer blocks than train.
    """
    heads = head_names(model)
    anatomy = Anatomy(heads, partial(blocks_in, model), job.task.peft_type)
    config = job.method.peft_config(model, anatomy)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(job.job.seed, "adapter"))
        adapted = get_peft_model(model, config).eval()
    if getattr(config, "bias", "none") == "all":  # only some of peft's configurations have one
        _freeze_other_biases(adapted, heads if job.method.head == "frozen" else ())
    return adapted


def adapter_layout(model: PeftModel) -> Layout:
    """Return the layout of all parameters that peft made trainable.

    The order is: A factors, B factors and magnitudes, then heads.
    """
    pairs = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    pairs.sort(key=lambda pair: (is_head(pair[0]), not is_factor_a(pair[0]), pair[0]))
    return Layout(tuple(n for n, _ in pairs), tuple(s for _, s in pairs))


def read(model: nn.Module, layout: Layout) -> Vector:
    """Copy the named parameters into a new vector, float32 [layout.size].

    Tensors that only travel beside an adapter are zero in the result.
    """
    parameters = dict(model.named_parameters())
    vector = np.zeros(layout.size, np.float32)
    for name, where in layout.slices.items():
        if name.startswith(BESIDE):
            continue
        vector[where] = parameters[name].detach().to("cpu", torch.float32).numpy().reshape(-1)
    return vector


@torch.no_grad()
def write(model: nn.Module, layout: Layout, vector: Vector) -> None:
    """Copy ``vector``, float32 [layout.size], into the named parameters of the model.

    Tensors that only travel beside an adapter are skipped.

    Raises:
        AdapterError: the vector has another length or dtype.
    """
    layout.check(vector)
    parameters = dict(model.named_parameters())
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        if name.startswith(BESIDE):
            continue
        values = torch.from_numpy(np.ascontiguousarray(vector[where])).view(shape)
        parameters[name].copy_(values)


def _freeze_other_biases(model: PeftModel, heads: Iterable[str]) -> None:
    """Freeze the biases that peft's "all" includes but that must not train.

    They are the biases of a frozen head and of replaced modules. A replaced module is the original
    that peft keeps beside its trainable copy.
    """
    frozen = tuple(f"{OUTER}{name}." for name in heads)
    for name, parameter in model.named_parameters():
        if ".original_module." in name or (frozen and name.startswith(frozen)):
            parameter.requires_grad_(False)
