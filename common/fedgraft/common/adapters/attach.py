"""All that trains, as one flat float32 vector with a named layout.

peft puts the low-rank factors and the trainable copy of the head into the model; this module
names them in a fixed order, so that what crosses the network is one array and what it means is
agreed by a fingerprint.
"""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgraft.common.backbones.blocks import blocks_in
from fedgraft.common.backbones.load import head_names
from fedgraft.common.backbones.timm import TIMM_HEADS
from fedgraft.common.config.job import Job
from fedgraft.common.errors import AdapterError
from fedgraft.common.methods import LoraMethod, PartialMethod
from fedgraft.common.seeds import derive_seed
from fedgraft.common.tasks import TASKS

__all__ = [
    "BESIDE",
    "DOMAIN",
    "EWC",
    "OUTER",
    "Layout",
    "Vector",
    "adapter_layout",
    "attach",
    "cut_rank",
    "is_factor_a",
    "is_factor_b",
    "is_head",
    "read",
    "write",
]

Vector = NDArray[np.float32]

KINDS_OF_TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear, Conv1D),
    "all-conv": (nn.Conv2d,),
}


# Before the names of what travels beside an adapter: ``domain.py``, ``consolidation.py``.
BESIDE = (DOMAIN, EWC) = ("domain.", "ewc.")
OUTER = "base_model.model."  # what peft puts before the names of the backbone's modules


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
