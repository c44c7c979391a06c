"""``[training]``: one site's local steps of AdamW in one round, and the rate over all of them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.config.augmentation import Augmentation
from fedgraft.common.section import IllegalJob, Section

__all__ = ["Consolidation", "Distillation", "DomainAdaptation", "Schedule", "Training"]


class Schedule(Section):
    """The learning rate: warm-up, then ``shape`` down to ``floor``, ``over`` all or each round.

    Over each round it starts again (warm restarts, Loshchilov and Hutter 2017, "SGDR").
    """

    over: Literal["federation", "round"] = "federation"
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of all steps")
    floor: float = Field(default=0.0, ge=0, le=1, description="share of the peak rate")


class Distillation(Section):
    """Learn from a teacher beside the labels: (1 - weight) of the loss, and weight T^2 KL to it.

    The teacher is each site's own (``teacher`` in its ``site.toml``) and never leaves it.
    """

    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0, le=100)


class DomainAdaptation(Section):
    """Make features of sites with and without labels alike (``client.domain`` has the sources)."""

    kind: Literal["coral", "mmd", "dann"]
    weight: float = Field(default=1.0, gt=0)
    components: int = Field(default=256, ge=16, le=4096, description="of mmd: random features")
    hidden: int = Field(default=64, ge=1, le=1024, description="of dann: the discriminator's units")


class Consolidation(Section):
    """Elastic weight consolidation: measure what the data depends on, hold to an earlier adapter.

    With ``weight = 0`` only measure, for a job that continues this one.
    """

    weight: float = Field(default=0.0, ge=0)


class Training(Section):
    """``[training]``: one site's local steps of AdamW in one round."""

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1, description="micro-batches per step")
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Schedule = Schedule()
    dropout: float = Field(default=0.0, ge=0, lt=1, description="inside the head")
    clip_norm: float = Field(default=1.0, ge=0, description="of a step's gradient; 0 is off")
    precision: Literal["fp32", "bf16"] = "fp32"
    proximal: float = Field(default=0.0, ge=0, description="FedProx mu")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share spread over labels")
    distillation: Distillation | None = None
    domain: DomainAdaptation | None = None
    consolidation: Consolidation | None = None
    augmentation: Augmentation | None = None
    group_by_length: bool = Field(default=False, description="texts about as long in a batch")
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="rate of each block beside that of the one above it"
    )
    unfreeze: float = Field(
        default=0.0, ge=0, le=1, description="share of all steps until the lowest block trains"
    )

    @property
    def alone(self) -> "Training":
        """The same without what only means something in a federation."""
        return self.model_copy(update={"domain": None, "consolidation": None})

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.batch_size % self.accumulation:
            raise IllegalJob(
                f"batch_size = {self.batch_size} is no multiple of accumulation = "
                f"{self.accumulation}",
                "a step is made of whole micro-batches",
            )
        return self
