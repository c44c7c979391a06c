"""``[method]``: what trains of a model, and so what travels. One section for each ``kind``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.section import IllegalJob, Section

__all__ = ["KINDS", "HeadMethod", "HeadPolicy", "LoraMethod", "Method", "PartialMethod"]

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


class PartialMethod(Section):
    """``kind = "partial"``: some weights of the backbone itself train, and the head by its policy.

    The last ``blocks`` as a whole, and beside them every normalisation layer or every bias (Ben
    Zaken et al. 2022, "BitFit").
    """

    kind: Literal["partial"]
    blocks: int = Field(default=1, ge=0, description="last blocks that train as a whole")
    norms: bool = Field(default=False, description="all normalisation layers train")
    biases: bool = Field(default=False, description="all biases train")
    head: HeadPolicy

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if not (self.blocks or self.norms or self.biases):
            raise IllegalJob("nothing of the backbone would train", 'blocks = 1, or kind = "head"')
        return self


Method = LoraMethod | HeadMethod | PartialMethod
KINDS = ("lora", "head", "partial")
