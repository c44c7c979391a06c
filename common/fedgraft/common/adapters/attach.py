"""All that trains, as one flat float32 vector with a named layout.

peft puts the low-rank factors and the trainable copy of the head into the model; this module
names them in a fixed order, so that what crosses the network is one array and what it means is
agreed by a fingerprint.
"""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgraft.common.backbones.blocks import blocks_in
from fedgraft.common.backbones.load import head_names
from fedgraft.common.config.job import Job
from fedgraft.common.errors import AdapterError
from fedgraft.common.layout import BESIDE, OUTER, Layout, Vector, is_factor_a, is_head
from fedgraft.common.methods import LoraMethod, PartialMethod
from fedgraft.common.seeds import derive_seed
from fedgraft.common.tasks import TASKS

__all__ = [
    "adapter_layout",
    "attach",
    "read",
    "write",
]

KINDS_OF_TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear, Conv1D),
    "all-conv": (nn.Conv2d,),
}


def attach(model: nn.Module, job: Job) -> PeftModel:
    """Put the job's adapter into ``model`` (in place) and return the peft model around it.

    Initial factors come from a seed hashed from the job's: equal at every site.

    Raises:
        AdapterError: the targets match no module of the model, or it has fewer blocks than train.
    """
    method = job.method
    heads = [] if method.head == "frozen" else list(head_names(model))
    if isinstance(method, LoraMethod):
        config = LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=_targets(model, method.targets),
            use_rslora=method.rslora,
            use_dora=method.dora,
            modules_to_save=heads or None,
            task_type=TASKS[job.job.task].peft,
        )
    else:  # peft's own marker for "no low-rank factors at all"
        config = LoraConfig(r=1, target_modules=DUMMY_TARGET_MODULES, modules_to_save=heads)
        if isinstance(method, PartialMethod):
            config.modules_to_save = [*heads, *_opened(model, method)]
            config.bias = "all" if method.biases else "none"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(job.job.seed, "adapter"))
        adapted = get_peft_model(model, config).eval()
    if config.bias == "all":
        _freeze_other_biases(adapted, head_names(model) if method.head == "frozen" else ())
    return adapted


def adapter_layout(model: PeftModel) -> Layout:
    """Every parameter that peft made trainable: A factors, B factors and magnitudes, then heads."""
    pairs = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    pairs.sort(key=lambda pair: (is_head(pair[0]), not is_factor_a(pair[0]), pair[0]))
    return Layout(tuple(n for n, _ in pairs), tuple(s for _, s in pairs))


def read(model: nn.Module, layout: Layout) -> Vector:
    """Copy the named parameters into a new vector, float32 [layout.size].

    What only travels beside an adapter is zero.
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

    What only travels beside an adapter is passed over.

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


def _opened(model: nn.Module, method: PartialMethod) -> list[str]:
    """Names of the modules of the backbone that train as a whole."""
    blocks = blocks_in(model)
    if method.blocks > len(blocks):
        raise AdapterError(
            f"method.blocks = {method.blocks}: this backbone has {len(blocks)}",
            hint="fewer, or method.norms or method.biases",
        )
    opened = list(blocks[len(blocks) - method.blocks :])
    if method.norms:
        inside = tuple(f"{name}." for name in (*opened, *head_names(model)))
        opened += [
            name
            for name, module in model.named_modules()
            if "Norm" in type(module).__name__  # whichever of the many, of torch or of a model
            and any(True for _ in module.parameters(recurse=False))
            and not f"{name}.".startswith(inside)
        ]
    return opened


def _freeze_other_biases(model: PeftModel, heads: Iterable[str]) -> None:
    """Freeze what peft's "all" means beside: a frozen head's biases, and those of replaced modules.

    The latter are the originals that peft keeps beside the copies that train.
    """
    frozen = tuple(f"{OUTER}{name}." for name in heads)
    for name, parameter in model.named_parameters():
        if ".original_module." in name or (frozen and name.startswith(frozen)):
            parameter.requires_grad_(False)


def _targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the modules outside the head that ``targets`` means.

    A target is ``all-linear``, ``all-conv``, or the end of a module's dotted name.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    heads = tuple(f"{name}." for name in head_names(model))
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*KINDS_OF_TARGETS["all-linear"], nn.Conv2d))
        and not f"{name}.".startswith(heads)
        # peft needs the rank to divide by the groups; depthwise kernels are tiny anyway
        and getattr(module, "groups", 1) == 1
    }
    found: set[str] = set()
    for target in wanted:
        kinds = KINDS_OF_TARGETS.get(target)
        matched = {
            name
            for name, module in modules.items()
            if (isinstance(module, kinds) if kinds else f".{name}".endswith(f".{target}"))
        }
        if not matched:
            _no_match(target, modules)
        found |= matched
    return sorted(found)


def _no_match(target: str, modules: Iterable[str]) -> None:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in modules})
    near = difflib.get_close_matches(target, leaves, n=1)
    raise AdapterError(
        f"method.targets: {target!r} matches no module of this backbone",
        hint=f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(leaves)}",
    )
