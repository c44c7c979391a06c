"""LoRA: low-rank factors beside frozen layers.

Hu et al. 2022, "LoRA: Low-Rank Adaptation...".
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedgraft.common.errors import AdapterError
from fedgraft.common.methods.base import Anatomy, HeadPolicy, MethodSection
from fedgraft.common.section import IllegalJob, Refuses

__all__ = ["LoraMethod", "find_targets"]

EVERY = ("all-linear", "all-conv")  # targets: all modules of a kind


class LoraMethod(MethodSection):
    """``kind = "lora"``: low-rank factors at ``targets``; the head has its own policy."""

    refuses: ClassVar[Refuses] = {
        "quantized_magnitudes": (
            "method.dora needs the norms of frozen weights, and quantised they are not at hand",
            'backbone.quantize = "none", or method.dora = false',
        ),
        "larger_ranks": (
            "simulation.ranks has {largest_rank}, more than the job's own rank",
            "raise method.rank, the rank of the shared adapter",
        ),
    }

    kind: Literal["lora"]
    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear", "all-conv"] | tuple[str, ...] = "all-linear"
    rslora: bool = Field(
        default=False, description="scale by alpha / sqrt(rank), not alpha / rank (Kalajdzievski)"
    )
    dora: bool = Field(
        default=False, description="a weight's magnitude trains apart from its direction (Liu)"
    )
    head: HeadPolicy

    @field_validator("targets", mode="before")
    @classmethod
    def _targets_are_names(cls, targets: object) -> object:
        """Refuse what is no list of names, before pydantic lists every possible type."""
        named = isinstance(targets, list | tuple) and all(isinstance(one, str) for one in targets)
        if not named and targets not in EVERY:
            raise IllegalJob("no list of module names", 'targets = ["query", "value"]')
        return targets

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not self.targets:
            raise IllegalJob("targets is empty", 'name modules, or use kind = "head"')
        return self

    @property
    def low_rank(self) -> int:
        """Return the rank of the shared adapter."""
        return self.rank

    @property
    def magnitudes(self) -> bool:
        """Return whether the method is DoRA."""
        return self.dora

    def describe(self) -> str:
        """Return the method with its rank, alpha and dropout."""
        return f"lora, rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}"

    def peft_config(self, model: Any, anatomy: Anatomy) -> Any:
        """Return a configuration with factors at ``targets``, and a trainable copy of each head.

        A frozen head gets no copy.

        Raises:
            AdapterError: a target matches no module.
        """
        from peft import LoraConfig

        heads = [] if self.head == "frozen" else list(anatomy.heads)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=find_targets(model, self.targets, anatomy.heads),
            use_rslora=self.rslora,
            use_dora=self.dora,
            modules_to_save=heads or None,
            task_type=anatomy.task,
        )


def find_targets(model: Any, targets: str | Sequence[str], heads: tuple[str, ...]) -> list[str]:
    """Return the full names of the modules outside the head that match ``targets``.

    A target is ``all-linear``, ``all-conv``, or the end of a module's dotted name. Other methods
    with ``targets`` use this function too.

    Raises:
        AdapterError: a target matches no module.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds_of: dict[str, tuple[type[nn.Module], ...]] = {
        "all-linear": (nn.Linear, Conv1D),
        "all-conv": (nn.Conv2d,),
    }
    wanted = [targets] if isinstance(targets, str) else list(targets)
    inside = tuple(f"{name}." for name in heads)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*kinds_of["all-linear"], nn.Conv2d))
        and not f"{name}.".startswith(inside)
        # peft needs a rank divisible by the groups; grouped (depthwise) kernels are tiny anyway
        and getattr(module, "groups", 1) == 1
    }
    found: set[str] = set()
    for target in wanted:
        kinds = kinds_of.get(target)
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
