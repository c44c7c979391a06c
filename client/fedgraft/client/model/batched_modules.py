"""The modules of a stack: each holds K values of its parameters, one for each site.

Inputs and outputs are [K x R, ...]: R rows of each site, site after site. ``values`` maps a
parameter's name to a tensor [K, *shape]; the owner of the stack sets it.

A new kind of peft layer needs a class here, the layer's twin, and a row of ``TWINS``.
"""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedgraft.client.model.randomness import Randomness, SiteDropout
from fedgraft.common.errors import AdapterError
from fedgraft.common.layout import OUTER

__all__ = ["TWINS", "Stacked", "stacked_module", "trained_tensor"]

MAGNITUDE = "lora_magnitude_vector"  # peft's name for the magnitude of DoRA


class Stacked(nn.Module):
    """A module with K values of each parameter, in the place of the module ``base``.

    ``trains`` names the tensors of ``values`` that the twin of a peft layer computes with.
    """

    trains: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.values: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the replaced module: a model may read, say, a layer's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class StackedLinearLora(Stacked):
    """A frozen layer with a low-rank path for each site: y + scaling * B A drop(x).

    Hu et al. 2022, "LoRA". A is [K, rank, in], B [K, out, rank].
    """

    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, scaling: float, dropout: SiteDropout) -> None:
        super().__init__(base)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` [K x R, ..., in] to [K x R, ..., out], in the dtype of ``x``."""
        result: torch.Tensor = self.base(x)
        return result + self.low_rank(self.dropout(x), self.values)

    def low_rank(self, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return scaling * B A x, [K x R, ..., out]."""
        a, b = (values[name].to(x.dtype) for name in ("lora_A", "lora_B"))
        if len(a) == 1:
            return functional.linear(functional.linear(x, a[0]), b[0]) * self.scaling
        low = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2))
        path = torch.bmm(low, b.transpose(1, 2)).view(*x.shape[:-1], -1)
        return path * self.scaling


class StackedConvLora(Stacked):
    """A frozen convolution with a low-rank convolution for each site.

    A is [K, rank, in, height, width] and has the stride of the frozen convolution; B is
    [K, out, rank, 1, 1].
    """

    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, like: nn.Conv2d, scaling: float, dropout: SiteDropout):
        super().__init__(base)
        self.scaling, self.dropout = scaling, dropout
        self.geometry: tuple[Any, ...] = (like.stride, like.padding, like.dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` [K x R, in, height, width] to [K x R, out, ...]."""
        result: torch.Tensor = self.base(x)
        return result + self.low_rank(self.dropout(x), self.values)

    def low_rank(self, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return scaling * B * A * x, [K x R, out, ...]."""
        a, b = (values[name].to(x.dtype) for name in ("lora_A", "lora_B"))
        parts = [
            functional.conv2d(functional.conv2d(part, one, None, *self.geometry), other)
            for part, one, other in zip(x.chunk(len(a)), a, b, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)) * self.scaling


class StackedDora(Stacked):
    """A frozen layer whose weight gets a new direction and a new magnitude for each site.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (ICML): each output's row of
    W + scaling * B A is divided by its norm and multiplied by the trained magnitude m:

        y = m / |W + s B A| * (W + s B A) x + bias

    As in the paper (section 4.3), no gradient flows through the norm. ``path`` is the low-rank path
    around ``base``. m is [K, out], or [K, 1, out, 1, 1] for a convolution. The change acts on the
    input after dropout, and the frozen layer on the whole input, as in peft.
    """

    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", MAGNITUDE)

    def __init__(self, base: nn.Module, path: "StackedLinearLora | StackedConvLora") -> None:
        super().__init__(base)
        self.path = path
        self.squares = (self._rows() ** 2).sum(-1)  # of the frozen rows, [out]: they never change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` [K x R, ..., in] or [K x R, in, height, width], as the frozen layer does."""
        result: torch.Tensor = self.base(x)
        kept = self.path.dropout(x)
        plain = result if kept is x else self.base(kept)
        axis = 1 if isinstance(self.path, StackedConvLora) else -1
        if (bias := getattr(self.base, "bias", None)) is not None:
            plain = plain - bias.view(-1, *[1] * (plain.ndim - 2) if axis == 1 else [])
        low = self.path.low_rank(kept, self.values)
        scale = self._scale().to(x.dtype)
        sites, outputs = scale.shape
        shape = [sites, 1, *[1] * (result.ndim - 1)]
        shape[2 if axis == 1 else -1] = outputs
        plain, low = (value.view(sites, -1, *value.shape[1:]) for value in (plain, low))
        scale = scale.view(shape)
        return result + ((scale - 1) * plain + scale * low).view(result.shape)

    def _scale(self) -> torch.Tensor:
        """Return the factor of each output, float32 [K, out].

        |w + s b A|^2 = |w|^2 + 2 s b A w + s^2 b A A' b' for the rows w of W and b of B. This
        formula needs no matrix as large as W for each site.
        """
        weight, s = self._rows(), self.path.scaling
        with torch.no_grad():
            a, b = (self.values[name].flatten(2).float() for name in ("lora_A", "lora_B"))
            cross = (b * (weight @ a.transpose(1, 2))).sum(-1)
            own = (b @ (a @ a.transpose(1, 2)) * b).sum(-1)
            norm = (self.squares + 2 * s * cross + s * s * own).sqrt()
        return self.values[MAGNITUDE].flatten(1) / norm

    def _rows(self) -> torch.Tensor:
        """Return the frozen weights of each output, float32 [out, in]."""
        frozen: torch.Tensor = self.base.weight  # type: ignore[assignment]
        rows = frozen.T if isinstance(self.base, Conv1D) else frozen.flatten(1)
        return rows.detach().float()


class StackedModule(Stacked):
    """K versions of a module that has trained parameters of its own, all or some of them.

    A part of a ``head`` computes in float32, the dtype in which heads are kept. A module inside the
    backbone computes in the backbone's dtype, and its output has the dtype of its input.
    """

    def __init__(self, base: nn.Module, *, head: bool) -> None:
        super().__init__(base)
        self.head = head

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply each site's own version to its rows of ``x`` [K x R, ...].

        More arguments are possible only if K = 1.
        """
        values = self._converted()
        sites = len(next(iter(values.values())))
        if self.head:
            x = x.to(next(iter(values.values())).dtype)
        if sites == 1:
            own = {name: value[0] for name, value in values.items()}
            return functional_call(self.base, own, (x, *args), kwargs)
        if args or kwargs:
            raise RuntimeError("no way to tell which of what it is given are rows of sites")
        if isinstance(self.base, nn.Linear):
            return self._linear(x, values)
        parts = [
            functional_call(self.base, {n: v[site] for n, v in values.items()}, part)
            for site, part in enumerate(x.chunk(sites))
        ]
        return torch.cat(parts)

    def _converted(self) -> dict[str, torch.Tensor]:
        if self.head:
            return self.values
        frozen = dict(self.base.named_parameters(recurse=False))
        return {name: value.to(frozen[name].dtype) for name, value in self.values.items()}

    def _linear(self, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute K linear layers in two kernels; one of weight and bias may be frozen."""
        sites, frozen = len(next(iter(values.values()))), dict(self.base.named_parameters())
        weight, bias = values.get("weight"), values.get("bias")
        bias = frozen["bias"][None] if bias is None and "bias" in frozen else bias
        rows = x.reshape(sites, -1, x.shape[-1])
        if weight is None:
            out = functional.linear(rows, frozen["weight"])
        else:
            out = torch.bmm(rows, weight.transpose(1, 2))
        out = out if bias is None else out + bias[:, None]
        return out.view(*x.shape[:-1], -1)


def _low_rank_twin(
    layer: PeftLinear | PeftConv2d, trains: Collection[str], randomness: Randomness
) -> Stacked:
    """Return the twin of a LoRA or DoRA layer."""
    inner = layer.lora_dropout["default"]
    dropout = SiteDropout(randomness, float(getattr(inner, "p", 0.0)))
    scaling = float(layer.scaling["default"])
    path: StackedLinearLora | StackedConvLora
    if isinstance(layer, PeftLinear):
        path = StackedLinearLora(layer.base_layer, scaling, dropout)
    else:
        like = layer.lora_A["default"]
        assert isinstance(like, nn.Conv2d)  # noqa: S101  # A of a PeftConv2d
        path = StackedConvLora(layer.base_layer, like, scaling, dropout)
    return StackedDora(layer.base_layer, path) if MAGNITUDE in trains else path


TWINS: dict[type[nn.Module], Callable[[Any, Collection[str], Randomness], Stacked]] = {
    PeftLinear: _low_rank_twin,
    PeftConv2d: _low_rank_twin,
}
"""Makes the twin of a peft layer from the layer, the names of its trained tensors, and randomness.

The names are those of ``trained_tensor``. ``trains`` of the twin must have all of them.
"""


def trained_tensor(model: nn.Module, name: str) -> tuple[str, str]:
    """Return the path of the module that computes with the tensor ``name``, and the name in it.

    ``model`` is a model of transformers with peft's layers in it, and ``name`` is from its layout.
    A tensor of a peft layer belongs to that layer, and any other to the module that it is in:

        layer.q_proj.lora_A.default.weight              layer.q_proj, lora_A
        layer.q_proj.ia3_l.default                      layer.q_proj, ia3_l
        classifier.modules_to_save.default.out.bias     classifier.out, bias

    Raises:
        AdapterError: the tensor is outside the model, as a prompt of peft is.
    """
    path = name.removeprefix(OUTER)
    if path == name:
        raise AdapterError(
            f"no way to train {name} here: peft keeps it outside the model",
            hint="a method whose tensors are in the model's layers, such as lora",
        )
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):  # the innermost layer
        owner = ".".join(parts[:depth])
        if parts[depth] == "base_layer" or not isinstance(_inside(model, owner), BaseTunerLayer):
            continue
        inner = [part for part in parts[depth:] if part != "default"]
        return owner, ".".join(inner).removesuffix(".weight")
    owner, _, attribute = path.replace(".modules_to_save.default", "").rpartition(".")
    return owner, attribute


def _inside(model: nn.Module, path: str) -> Any:
    """Return the module at ``path``; None if something else is there, such as a parameter."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def stacked_module(
    module: nn.Module, trains: Collection[str], randomness: Randomness, *, head: bool = False
) -> Stacked:
    """Return the replacement of ``module``, one of peft's layers or a part of a head.

    ``trains`` are the names of its trained tensors, as in ``trained_tensor``.

    Raises:
        AdapterError: ``module`` is a layer of peft that has no twin, or whose twin lacks a tensor.
    """
    if not isinstance(module, BaseTunerLayer):
        return StackedModule(module, head=head)
    for kind, make in TWINS.items():
        if isinstance(module, kind):
            twin = make(module, trains, randomness)
            if missing := sorted(set(trains).difference(twin.trains)):
                raise _no_twin(module, f", because of its {', '.join(missing)}")
            return twin
    raise _no_twin(module, "")


def _no_twin(layer: nn.Module, why: str) -> AdapterError:
    kind = type(layer)
    return AdapterError(
        f"no way to train a layer {kind.__module__}.{kind.__qualname__} here{why}",
        hint="method.targets: linear layers and two-dimensional convolutions, or another "
        "method.kind; a new method gives the layer a twin in batched_modules.py",
    )
