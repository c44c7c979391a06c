"""``[training.augmentation]``: random changes of training examples, new in each step."""

from typing import Self

from pydantic import Field, model_validator

from fedgraft.common.section import IllegalJob, Section

__all__ = ["AudioAugmentation", "Augmentation", "ImageAugmentation", "TextAugmentation"]


class ImageAugmentation(Section):
    """Augmentation by kornia (Riba et al. 2020), on pixels as the model reads them."""

    flip: bool = Field(default=False, description="half of them left to right")
    shift: float = Field(default=0.0, ge=0, le=1, description="at most, share of a side")
    rotate: float = Field(default=0.0, ge=0, le=180, description="at most, degrees")
    zoom: float = Field(default=0.0, ge=0, lt=1, description="at most, share of the size")
    erase: float = Field(default=0.0, ge=0, le=1, description="share that gets a blank rectangle")
    noise: float = Field(default=0.0, ge=0, description="standard deviation, of normalised pixels")


class TextAugmentation(Section):
    """Augmentation of tokens: word dropout (Iyyer et al. 2015), swaps (EDA, Wei and Zou 2019)."""

    hide: float = Field(default=0.0, ge=0, lt=1, description="share hidden from attention")
    swap: float = Field(default=0.0, ge=0, lt=1, description="share of pairs swapped")


class AudioAugmentation(Section):
    """Augmentation of samples or spectrogram frames; frames take only ``delay`` and ``noise``."""

    gain: float = Field(default=0.0, ge=0, le=60, description="at most louder or softer, decibels")
    delay: float = Field(default=0.0, ge=0, lt=1, description="at most, share of the length, round")
    noise: float = Field(default=0.0, ge=0, description="standard deviation, of what is read")


class Augmentation(Section):
    """The augmentation of one modality: of the one that the job's task reads."""

    image: ImageAugmentation | None = None
    text: TextAugmentation | None = None
    audio: AudioAugmentation | None = None

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        parts = self.model_dump(exclude_none=True).values()
        if not any(value for part in parts for value in part.values()):
            raise IllegalJob(
                "training.augmentation varies nothing", "image = { flip = true }, or leave it out"
            )
        return self
