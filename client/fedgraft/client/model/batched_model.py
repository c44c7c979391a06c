"""A stack: one frozen backbone with the adapters of several sites, which one pass trains.

A stack is the twin of a peft model and shares its frozen tensors. Only the modules that peft
inserted are replaced: the new ones hold K values of each parameter, one for each site. A batch is
[K x R, ...]: R rows of each site, site after site. Frozen layers see one large batch; a low-rank
path is a batched matrix product. The code of the backbone stays unchanged. A real site runs a stack
with K = 1.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fedgraft.client.data.padding import Padding
from fedgraft.client.model.batched_modules import Stacked, stacked_module, trained_tensor
from fedgraft.client.model.cut import Prefix
from fedgraft.client.model.quantization import quantized_layers
from fedgraft.client.model.randomness import Randomness, SiteDropout
from fedgraft.client.objectives import OBJECTIVES, Objective
from fedgraft.common.adapters.model import Workbench, made_of
from fedgraft.common.backbones.load import body_names
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError
from fedgraft.common.examples import Examples
from fedgraft.common.layout import Layout, Vector, is_head

__all__ = ["Stack", "check_stacking", "open_stack"]

E = TypeVar("E", bound=Examples)

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Attention that is faster than the model's own choice (docs/results.md): on a CPU, the backward
# pass of fused attention takes half of a bf16 step.
ATTENTION = {("cpu", "bf16"): "eager"}
AGREEMENT = 1e-3  # for logits around 1; if rows of sites mix, they differ by far more


@dataclass
class Stack:
    """A frozen backbone with stacked adapters.

    ``model`` computes with the adapters that were ``put`` last. It is the twin of the model of
    ``bench``. Frozen linear layers have ``bits`` bits (0: they are not quantised).
    """

    bench: Workbench
    model: nn.Module
    device: torch.device
    randomness: Randomness
    modules: dict[str, tuple[Stacked, str]]
    fixed: dict[str, torch.Tensor]
    bits: int = 0
    prefixes: dict[tuple[str, ...], Prefix | None] = field(default_factory=dict)
    padding: Padding = field(init=False)

    def __post_init__(self) -> None:
        self.padding = Padding(self.model)

    @property
    def objective(self) -> Objective:
        """The objective of the job's task, which compares predictions with targets."""
        return OBJECTIVES[self.bench.task.target]

    def settle(self, examples: E) -> E:
        """Return ``examples``, padded on the side on which padding changes no answer."""
        return self.padding.settle(examples, self.randomness.sites)

    def put(self, trained: Layout, flat: torch.Tensor) -> list[torch.Tensor]:
        """Compute with ``flat``, float32 [sites, trained.size]; other tensors get initial values.

        Nothing is copied: the modules hold views of ``flat``. Return these views in the order of
        ``trained``.
        """
        sites = len(flat)
        self.randomness.sites = sites
        views: dict[str, torch.Tensor] = {}
        for name, (module, attribute) in self.modules.items():
            where = trained.slices.get(name)
            if where is None:
                initial = self.fixed[name]
                module.values[attribute] = initial.expand(sites, *initial.shape[1:])
                continue
            value = flat[:, where].view(sites, *self.fixed[name].shape[1:])
            views[name] = module.values[attribute] = value
        for name, shape in zip(trained.names, trained.shapes, strict=True):
            if name not in views:  # it travels beside the adapter: no module computes with it
                views[name] = flat[:, trained.slices[name]].view(sites, *shape)
        return [views[name] for name in trained.names]

    def put_one(self, trained: Layout, vector: Vector) -> None:
        """Compute with one adapter, float32 [trained.size]."""
        self.put(trained, torch.from_numpy(np.ascontiguousarray(vector))[None].to(self.device))

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return logits, float32 [sites x rows, classes], or the objective's other predictions."""
        return self.objective.predicted(self.model(**self.ready(inputs)), self.model)

    def ready(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``inputs`` on the device, floating-point tensors in the backbone's dtype."""
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for key, value in inputs.items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the frozen backbone computes in."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def open_stack(job: Job, *, device: str = "cpu") -> Stack:
    """Return the stack for ``job`` on ``device``; the same object for the same backbone and method.

    Raises:
        FedgraftError: as ``open_workbench``.
    """
    precision, bits = job.training.precision, job.backbone.bits
    return made_of(
        job,
        f"stack {precision} {device}",
        lambda bench: _build(bench, torch.device(device), precision, bits),
    )


def _build(bench: Workbench, device: torch.device, precision: str, bits: int) -> Stack:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = _twin(bench.model.get_base_model(), device, dtype, bits)
    if attention := ATTENTION.get((device.type, precision)):
        model.set_attn_implementation(attention)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # of keys and values, for generation; rows are complete here
    randomness = Randomness()
    modules = _replace_adapters(model, bench.layout.of_model, randomness)
    _seed_head_dropout(model, randomness)
    model.requires_grad_(False).eval()
    values = torch.from_numpy(bench.initial).to(device)
    fixed = {
        name: values[where].view(1, *shape)
        for (name, where), shape in zip(
            bench.layout.slices.items(), bench.layout.shapes, strict=True
        )
    }
    stack = Stack(bench, model, device, randomness, modules, fixed, bits)
    stack.put_one(bench.layout, bench.initial)
    return stack


def _twin(model: Any, device: torch.device, dtype: torch.dtype, bits: int) -> Any:
    """Copy the module tree; the copy has the same tensors, or converted or quantised ones.

    Batch norm stays in float32, because its running statistics are in float32.
    """
    exact = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, BATCH_NORM)
        for tensor in module.parameters(recurse=False)
    }
    # deepcopy replaces an object by the value that this dictionary has for the object's id.
    memo: dict[int, Any] = dict(quantized_layers(model, bits, device, dtype)) if bits else {}
    replaced = {id(p) for m in model.modules() if id(m) in memo for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) in replaced:
            continue
        wanted = torch.float32 if id(parameter) in exact else dtype
        memo[id(parameter)] = _copied(parameter, device, wanted)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(device)
    return copy.deepcopy(model, memo)


Copies = WeakValueDictionary[tuple[torch.device, torch.dtype], nn.Parameter]
_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Copies of frozen tensors on another device or in another dtype, which stacks share."""


def _copied(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Return the frozen tensor on ``device`` in ``dtype``; workbenches of a backbone share it."""
    copies: Copies = _COPIES[parameter] if parameter in _COPIES else WeakValueDictionary()
    made = copies.get((device, dtype))
    if made is None:
        made = nn.Parameter(parameter.detach().to(device, dtype), requires_grad=False)
        if not parameter.requires_grad:
            copies[device, dtype] = made
            _COPIES[parameter] = copies
    return made


def _replace_adapters(
    model: nn.Module, layout: Layout, randomness: Randomness
) -> dict[str, tuple[Stacked, str]]:
    """Replace peft's modules by stacked ones; return module and attribute of each tensor."""
    found = {name: trained_tensor(model, name) for name in layout.names}
    _unwrap_heads(model)
    heads = {found[name][0] for name in layout.names if is_head(name)}
    tensors: dict[str, set[str]] = {}
    for path, attribute in found.values():
        tensors.setdefault(path, set()).add(attribute)
    made: dict[str, Stacked] = {}
    for path in sorted(tensors, key=lambda path: -path.count(".")):  # inner modules first
        module = model.get_submodule(path)
        made[path] = stacked_module(module, tensors[path], randomness, head=path in heads)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[path])
    return {name: (made[path], attribute) for name, (path, attribute) in found.items()}


def _unwrap_heads(model: nn.Module) -> None:
    """Replace peft's wrapper around each head by the trainable copy inside it."""
    for name, child in list(model.named_modules()):
        if (copies := getattr(child, "modules_to_save", None)) is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, copies["default"])


def _seed_head_dropout(model: Any, randomness: Randomness) -> None:
    """Replace every dropout of the head, which is all outside the body, by seeded dropout."""
    bodies = tuple(f"{name}." for name in body_names(model))
    for name, module in list(model.named_modules()):
        inside = f"{name}.".startswith(bodies)
        if isinstance(module, nn.Dropout) and not inside:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SiteDropout(randomness, None))


def check_stacking(stack: Stack, inputs: dict[str, torch.Tensor]) -> None:
    """Check that rows of different sites never mix: compare two stacked sites with each alone.

    ``inputs`` are a few rows. A backbone that adapts a tensor without a batch dimension, such as a
    table of positions, cannot be stacked.

    Raises:
        InputError: the backbone mixes sites.
    """
    rows = len(next(iter(inputs.values())))
    generator = np.random.default_rng(0)
    layout = stack.bench.layout
    drawn = generator.normal(0, 0.05, (2, layout.size)).astype(np.float32)
    adapters: NDArray[np.float32] = stack.bench.initial + drawn
    twice = {key: torch.cat([value, value.flip(0)]) for key, value in inputs.items()}
    alone = []
    with torch.inference_mode():
        for site in range(2):
            stack.put_one(layout, adapters[site])
            half = slice(site * rows, (site + 1) * rows)
            alone.append(stack.logits({key: value[half] for key, value in twice.items()}))
        stack.put(layout, torch.from_numpy(adapters).to(stack.device))
        try:
            together = stack.logits(twice)
        except RuntimeError:  # a tensor without a batch dimension can seldom be split into sites
            together = torch.full_like(torch.cat(alone), torch.nan)
    difference = (together - torch.cat(alone)).abs().max() / (1 + together.abs().max())
    if not float(difference) < (0.1 if stack.dtype == torch.bfloat16 else AGREEMENT):
        raise InputError(
            "this backbone cannot be trained for several sites in one pass: its rows would mix",
            hint="simulation.sites_per_pass = 1",
        )
