"""``[training]``: a site's local AdamW steps in one round, and the learning rate over all steps."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.config.augmentation import Augmentation
from fedgraft.common.section import IllegalJob, Section

__all__ = ["Consolidation", "Distillation", "DomainAdaptation", "Schedule", "Training"]


class Schedule(Section):
    """The learning rate: warm-up, then a fall to ``floor`` in the form of ``shape``.

    ``over``: one schedule over all rounds, or one for each round. With one for each round the
    schedule restarts (warm restarts, Loshchilov and Hutter 2017, "SGDR").
    """

    over: Literal["federation", "round"] = "federation"
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of all steps")
    floor: float = Field(default=0.0, ge=0, le=1, description="share of the peak rate")


class Distillation(Section):
    """Distillation: the loss is (1 - weight) x label loss + weight x T^2 x KL to a teacher.

    Each site has its own teacher (``teacher`` in its ``site.toml``), which never leaves the site.
    """

    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0, le=100)


class DomainAdaptation(Section):
    """Domain adaptation: make features of sites with labels and of sites without labels similar.

    ``client/training/domain_adaptation.py`` has the sources.
    """

    kind: Literal["coral", "mmd", "dann"]
    weight: float = Field(default=1.0, gt=0)
    components: int = Field(default=256, ge=16, le=4096, description="of mmd: random features")
    hidden: int = Field(default=64, ge=1, le=1024, description="of dann: the discriminator's units")


class Consolidation(Section):
    """Elastic weight consolidation: keep weights that the data needs close to an earlier adapter.

    The training measures the importance of each weight for the data. With ``weight = 0`` it only
    measures, for a later job that continues this job.
    """

    weight: float = Field(default=0.0, ge=0)


class Training(Section):
    """``[training]``: a site's local AdamW steps in one round."""

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
        """Return these settings without those that only have a meaning in a federation."""
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
