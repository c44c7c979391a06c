"""``[simulation.faults]``: intended faults, so that a consortium can practise with them."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedgraft.common.section import Duration, IllegalJob, Section

__all__ = ["Faults"]


def _word(value: object) -> object:
    """Return "nan" for a NaN.

    TOML, and with it ``--set simulation.faults.poison=nan``, reads a bare nan as a number.
    """
    return "nan" if isinstance(value, float) and math.isnan(value) else value


Poison = Annotated[Literal["labels", "sign-flip", "noise", "nan"], BeforeValidator(_word)]


class Faults(Section):
    """``[simulation.faults]``; all faults are off by default.

    ``stragglers`` and ``poisoned`` are shares of the sites. The same sites are affected during the
    whole run, at least one site if the share is above 0. ``delay`` is the mean of an exponential
    distribution, in seconds.
    """

    dropout: float = Field(default=0.0, ge=0, lt=1, description="chance of a site in a round")
    stragglers: float = Field(default=0.0, ge=0, le=1)
    delay: Duration = 600.0
    poisoned: float = Field(default=0.0, ge=0, le=1)
    poison: Poison = "labels"

    @property
    def any(self) -> bool:
        """Return whether any fault is on."""
        return bool(self.dropout or self.stragglers or self.poisoned)

    @property
    def poisons_labels(self) -> bool:
        """Return whether some sites get wrong labels."""
        return self.poisoned > 0 and self.poison == "labels"

    @property
    def poisons_updates(self) -> bool:
        """Return whether updates are changed on their way to the coordinator."""
        return self.poisoned > 0 and self.poison != "labels"

    def check_masked(self) -> None:
        """Check that these faults can be simulated under secure aggregation.

        Raises:
            IllegalJob: a fault must change updates, but the updates are masked.
        """
        if self.poisons_updates:
            raise IllegalJob(
                f'poison "{self.poison}" alters updates on their way, and those that secure '
                "aggregation masks cannot be altered into anything but nonsense",
                'simulation.faults.poison = "labels", '
                "or privacy.secure_aggregation.enabled = false",
            )
