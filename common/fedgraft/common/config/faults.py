"""``[simulation.faults]``: what goes wrong on purpose, so that a consortium can rehearse it."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedgraft.common.section import Duration, IllegalJob, Section

__all__ = ["Faults"]


def _word(value: object) -> object:
    """TOML, and with it ``--set simulation.faults.poison=nan``, reads a bare nan as a number."""
    return "nan" if isinstance(value, float) and math.isnan(value) else value


Poison = Annotated[Literal["labels", "sign-flip", "noise", "nan"], BeforeValidator(_word)]


class Faults(Section):
    """``[simulation.faults]``; all off by default.

    ``stragglers`` and ``poisoned`` are shares of the sites, the same sites all run; at least one
    where the share is above 0. ``delay`` is the mean of an exponential distribution, in seconds.
    """

    dropout: float = Field(default=0.0, ge=0, lt=1, description="chance of a site in a round")
    stragglers: float = Field(default=0.0, ge=0, le=1)
    delay: Duration = 600.0
    poisoned: float = Field(default=0.0, ge=0, le=1)
    poison: Poison = "labels"

    @property
    def any(self) -> bool:
        """Whether anything goes wrong on purpose."""
        return bool(self.dropout or self.stragglers or self.poisoned)

    @property
    def poisons_labels(self) -> bool:
        """Whether sites are written with wrong labels."""
        return self.poisoned > 0 and self.poison == "labels"

    @property
    def poisons_updates(self) -> bool:
        """Whether updates are altered on their way to the coordinator."""
        return self.poisoned > 0 and self.poison != "labels"

    def check_masked(self) -> None:
        """Whether these faults can be played under secure aggregation.

        Raises:
            IllegalJob: updates would have to be altered, and they are masked.
        """
        if self.poisons_updates:
            raise IllegalJob(
                f'poison "{self.poison}" alters updates on their way, and those that secure '
                "aggregation masks cannot be altered into anything but nonsense",
                'simulation.faults.poison = "labels", '
                "or privacy.secure_aggregation.enabled = false",
            )
