"""``[evaluation]``: further metrics beside loss, accuracy and F1, and metrics by group."""

from pydantic import Field, field_validator

from fedgraft.common.metrics.measures import CALIBRATION_BINS
from fedgraft.common.section import IllegalJob, Section

__all__ = ["Evaluation"]


class Evaluation(Section):
    """``[evaluation]``: if absent, only the confusion matrix is counted."""

    score_bins: int = Field(
        default=0, ge=0, le=1000, description="for AUROC and calibration error; 0 is neither"
    )
    min_group: int = Field(
        default=20, ge=1, description="examples below which a group of data.groups is not shown"
    )

    prompt: str = Field(
        default="a photo of a {}.", description="zero-shot of dual encoders: {} is a label's name"
    )

    @field_validator("prompt")
    @classmethod
    def _prompt_names_the_label(cls, prompt: str) -> str:
        if prompt.count("{}") != 1 or set(prompt.replace("{}", "", 1)) & set("{}"):
            raise IllegalJob("it needs one {}, where the label's name goes", '"a photo of a {}."')
        return prompt

    @field_validator("score_bins")
    @classmethod
    def _edges_are_shared(cls, bins: int) -> int:
        if bins % CALIBRATION_BINS:
            raise IllegalJob(
                f"score_bins = {bins} is no multiple of {CALIBRATION_BINS}",
                f"score_bins = {max(CALIBRATION_BINS, bins - bins % CALIBRATION_BINS)}",
            )
        return bins
