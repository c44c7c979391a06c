"""``[method]``: what trains of a model, and so what travels. One section for each ``kind``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.section import IllegalJob, Section

__all__ = ["HeadMethod", "HeadPolicy", "LoraMethod", "Method"]

HeadPolicy = Literal["shared", "local", "frozen"]


class LoraMethod(Section):
    """``kind = "lora"``: low-rank factors at ``targets``, and the head by its own policy."""

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

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not self.targets:
            raise IllegalJob("targets is empty", 'name modules, or use kind = "head"')
        return self


class HeadMethod(Section):
    """``kind = "head"``: the backbone as feature extractor, only the shared head trains."""

    kind: Literal["head"]
    head: Literal["shared"] = "shared"


Method = LoraMethod | HeadMethod
