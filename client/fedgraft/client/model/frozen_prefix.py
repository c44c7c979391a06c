"""The frozen prefix: layers below the first trained layer, computed once per example and cached.

A frozen layer in eval mode gives the same activations in every epoch and round
(docs/decisions/0006). So the input of the first trained layer can be cached, and the layers below
it can be skipped. If only the head trains, the input of the head is cached and the whole body is
skipped.

Nothing here depends on an architecture. There are two ways to cut: a container of repeated layers
(``nn.ModuleList``, ``Sequential``) at its first trained layer; or the chain of modules from the
body's output to the model's, which is found by following tensors through one forward pass. Then the
cut is checked: resuming from it must give the same bits as the whole model, an example's
activations must be the same bits whichever other examples are in the batch, and about the same
numbers in a wider batch. Otherwise there is no prefix.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fedgraft.client.data.batches import Inputs
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.cut import Prefix
from fedgraft.common.backbones.load import body_names
from fedgraft.common.layout import Layout

__all__ = ["FEWEST", "find_prefix", "identity_of"]

AGREEMENT = 1e-3  # of activations in batches of two widths, relative to the largest
ROUGH = 0.1  # the same in half precision
FEWEST = 8  # rows in a pass: kernels for fewer rows may add in another order


class _Reached(Exception):  # not an error: it ends a forward pass early
    """The cut was reached."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def find_prefix(stack: Stack, trained: Layout, inputs: Inputs, *, wider: Inputs) -> Prefix | None:
    """Return the longest prefix below the tensors of ``trained``; None if none passes the check.

    ``inputs`` have ``FEWEST`` rows or more; ``wider`` are the same rows with more padding.
    """
    stack.put_one(stack.bench.layout, stack.bench.initial)
    modules = {id(stack.modules[name][0]) for name in trained.of_model.names}
    order, chain, name = _follow(stack, inputs)
    found: list[tuple[str, _Stop, _Resume]] = []
    if chain and modules <= {id(m) for link in chain for m in link.modules()}:
        found.append(("head", *_cut_before_head(stack, chain, name)))
    if cut := _widest_cut(stack, modules, order):
        found.append((f"{cut[0]}.{cut[2]}", *_cut_in_container(stack, cut[1], cut[2])))
    for place, stop, resume in found:
        proved = _proved(stack, stop, resume, inputs, wider)
        if proved is not None:
            whole = place != "head"
            return Prefix(identity_of(stack, place), whole, *proved, stop, resume)
    return None


_Stop = Callable[[Inputs], torch.Tensor]
_Resume = Callable[[Inputs, torch.Tensor], torch.Tensor]


def identity_of(stack: Stack, place: str) -> str:
    """Return a hash of everything that decides the bits of an activation, except the example."""
    import transformers  # imported here: its first import replaces it in sys.modules

    bench = stack.bench
    parts = (
        bench.backbone.fingerprint,
        bench.drawn,
        place,
        str(stack.dtype),
        f"{stack.bits} bits" + (version("bitsandbytes") if stack.bits else ""),
        stack.device.type,
        torch.__version__,
        transformers.__version__,
        torch.backends.cpu.get_cpu_capability() if stack.device.type == "cpu" else "",
        str(torch.get_num_threads()),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _follow(stack: Stack, inputs: Inputs) -> tuple[dict[int, int], list[nn.Module], str]:
    """Return the order in which modules are first entered, and the chain from body to output.

    The chain's result is the returned field of the model's output, such as ``logits``. The chain is
    empty if it ends elsewhere, or if any module of it gets another input than the output of the one
    before.
    """
    bodies = body_names(stack.model)
    heads = {id(child) for name, child in stack.model.named_children() if name not in bodies}
    order: dict[int, int] = {}
    links: list[tuple[nn.Module, Any, Any]] = []

    def entered(module: nn.Module, args: Any) -> None:
        order.setdefault(id(module), len(order))

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in heads:
            links.append((module, args[0] if args else None, output))

    handles = [m.register_forward_pre_hook(entered) for m in stack.model.modules()]
    handles += [m.register_forward_hook(left) for m in stack.model.children()]
    try:
        with torch.no_grad():
            ready = stack.ready(inputs)
            output: Any = stack.model(**ready)
    finally:
        for handle in handles:
            handle.remove()
    fields = [name for name, value in output.items() if links and value is links[-1][2]]
    if not fields or not all(one[2] is other[1] for one, other in pairwise(links)):
        return order, [], ""
    return order, [module for module, _, _ in links], fields[0]


def _widest_cut(
    stack: Stack, trained: set[int], order: dict[int, int]
) -> tuple[str, nn.Module, int] | None:
    """Return the path, container and index of the cut that skips most parameters; None without."""
    first = min((order[one] for one in trained if one in order), default=0)
    found: list[tuple[int, str, nn.Module, int]] = []
    outside: list[str] = []
    for path, module in stack.model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or path.startswith(tuple(outside)):
            continue
        outside.append(f"{path}.")  # containers inside a container are cut with it
        layers = list(module)
        holds = [any(id(m) in trained for m in layer.modules()) for layer in layers]
        cut = holds.index(True) if True in holds else len(layers)
        if cut and order.get(id(layers[0]), first) < first:
            size = sum(p.numel() for layer in layers[:cut] for p in layer.parameters())
            found.append((size, path, module, cut))
    return max(found, key=lambda one: one[0])[1:] if found else None


def _cut_before_head(stack: Stack, chain: Sequence[nn.Module], name: str) -> tuple[_Stop, _Resume]:
    def stop(inputs: Inputs) -> torch.Tensor:
        return _until(stack, chain[0], inputs, before=True)

    def resume(inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        for link in chain:
            hidden = link(hidden)
        return stack.objective.predicted(SimpleNamespace(**{name: hidden}), stack.model)

    return stop, resume


def _cut_in_container(stack: Stack, container: Any, cut: int) -> tuple[_Stop, _Resume]:
    layers = list(container)

    def stop(inputs: Inputs) -> torch.Tensor:
        last = cut == len(layers)
        return _until(stack, layers[cut - last], inputs, before=not last)

    def resume(inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        with _passing_over(container, layers[:cut], hidden):
            return stack.logits(inputs)

    return stop, resume


@torch.no_grad()
def _until(stack: Stack, module: nn.Module, inputs: Inputs, *, before: bool) -> torch.Tensor:
    """Return the input (or output) of ``module``, without computing the layers after it."""

    def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = (
        module.register_forward_pre_hook(entering, with_kwargs=True)
        if before
        else module.register_forward_hook(leaving)
    )
    try:
        stack.logits(inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RuntimeError("the cut was not reached")


class _PassedOver(nn.Module):
    """The replacement of a skipped layer: it returns cached activations, or its own input."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor | None) -> None:
        super().__init__()
        self.hidden = hidden
        for name, value in vars(layer).items():  # such as the layer's kind of attention
            if isinstance(value, str | int) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.hidden is None else self.hidden


@contextmanager
def _passing_over(
    container: Any, below: Sequence[nn.Module], hidden: torch.Tensor
) -> Iterator[None]:
    """Let the layers ``below`` return ``hidden`` instead of computing it."""
    last = len(below) - 1
    for index, layer in enumerate(below):
        container[index] = _PassedOver(layer, hidden if index == last else None)
    try:
        yield
    finally:
        for index, layer in enumerate(below):
            container[index] = layer


def _proved(
    stack: Stack, stop: _Stop, resume: _Resume, inputs: Inputs, wider: Inputs
) -> tuple[bool, torch.Tensor] | None:
    """Return ``Prefix.by_token`` and ``Prefix.unit``; None unless resuming gives the same bits."""
    with torch.no_grad():
        try:
            hidden = stop(inputs)
            same = _same(resume(inputs, hidden), stack.logits(inputs))
            again = {key: torch.cat([value, value.flip(0)]) for key, value in inputs.items()}
            others, spread = stop(again), stop(wider)
        except Exception:  # the model has another structure: then nothing is cached
            return None
    mask = inputs.get("attention_mask")
    by_token = mask is not None and hidden.ndim > 2 and hidden.shape[:2] == mask.shape
    real = torch.ones_like(hidden[..., :1])
    if by_token and mask is not None:
        real = mask.to(hidden)[(...,) + (None,) * (hidden.ndim - 2)]
    same = same and _same(hidden * real, others[: len(hidden)] * real)
    same = same and _same(hidden * real, others[len(hidden) :].flip(0) * real)
    if by_token and mask is not None:
        same = same and _close(hidden[mask.bool()], spread[wider["attention_mask"].bool()])
    else:
        same = same and _close(hidden, spread)
    with torch.no_grad():  # padding is not cached: nothing may depend on it
        same = same and _same(resume(inputs, hidden * real), stack.logits(inputs))
    unit = hidden.new_empty(0, *hidden.shape[2 if by_token else 1 :])
    return (by_token, unit.cpu()) if same else None


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether the values are equal but for the order of sums, which a width decides."""
    if one.shape != other.shape:
        return False
    limit = ROUGH if one.dtype.itemsize < 4 else AGREEMENT
    kept = one.isfinite() & other.isfinite()
    far = torch.where(kept, one - other, 0.0).abs()
    return bool((far <= limit * (1 + one.nan_to_num(0, 0, 0).abs().max())).all())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether all values are equal; NaN must stand in the same places of both."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(0.0, torch.inf, -torch.inf), other.nan_to_num(0.0, torch.inf, -torch.inf)
    )
