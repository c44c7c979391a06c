"""``[privacy.secure_aggregation]``: masked sums, and the numbers that decide what they hide."""

import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.graph import FEWEST, GraphPlan, plan_graph
from fedgraft.common.section import IllegalJob, Section

if TYPE_CHECKING:
    from fedgraft.common.secagg.quantize import Coding

__all__ = ["FEWEST", "SecureAggregation"]

FINEST = 20  # bits of a quantised value: more would be lost in float32 anyway
# An example of a task made of parts, such as a block of text, is taken to have so many tokens at
# most on average. With the most that a block can have, small sites would drown in rounding.
USUAL_PARTS = 64
LOSS_LIMIT = 64.0  # nats times weight / max_weight: with a full weight, a loss that has diverged


class SecureAggregation(Section):
    """``[privacy.secure_aggregation]``: the coordinator sees sums over a cohort and nothing else.

    Each update is clipped to ``clip`` in every coordinate and quantised; no sum of ``max_sites``
    updates can overflow the ring. At least one site, up to the share ``colluders``, may work with
    the coordinator. Up to the share ``dropouts`` may vanish in a round.
    """

    enabled: bool = False
    clip: float = Field(default=0.1, gt=0)
    max_sites: int = Field(default=128, ge=FEWEST, le=65535)
    max_weight: int = Field(default=16384, ge=1, description="examples of one site")
    ring_bits: Literal[16, 24, 32] | None = Field(default=None, description="by max_sites")
    value_bits: int | None = Field(default=None, ge=2, le=32, description="by max_sites and ring")
    colluders: float = Field(default=0.1, ge=0, lt=0.5)
    dropouts: float = Field(default=0.2, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _no_sum_can_overflow(self) -> Self:
        if not self.enabled:
            return self
        try:
            self.coding(by_examples=True)
        except ParameterError as error:
            raise IllegalJob(
                str(error), "lower max_sites, value_bits or max_weight, or take ring_bits = 32"
            ) from None
        return self

    def weights(self, most_parts: int = 1) -> tuple[int, int]:
        """Return the largest weight of a site, and the number of training targets for weight 1.

        A site's weight is the number of its training targets: of its examples, or of tokens if an
        example has up to ``most_parts`` tokens. ``max_weight`` counts examples. Only if a sum of
        ``max_sites`` weights could overflow, several targets make up the weight 1.
        """
        from fedgraft.common.secagg.quantize import WORD

        targets = self.max_weight * min(most_parts, USUAL_PARTS)
        if most_parts == 1:
            return targets, 1  # jobs with too many examples are refused
        unit = max(-(-targets // (WORD // self.max_sites)), 1)
        return -(-targets // unit), unit

    def coding(self, *, by_examples: bool, most_parts: int = 1) -> "Coding":
        """Return the coding of updates as ring elements.

        If not ``by_examples``, the mean is uniform: every site has the weight 1. ``most_parts`` is
        the largest number of training targets of an example.
        """
        from fedgraft.common.secagg.quantize import Coding

        ring = self.ring_bits or (24 if self.max_sites <= 128 else 32)
        room = ((1 << (ring - 1)) - 1) // self.max_sites  # the largest value of one site
        return Coding(
            parties=self.max_sites,
            clip=self.clip,
            ring_bits=ring,
            value_bits=self.value_bits or max(min((room + 1).bit_length(), FINEST), 2),
            max_weight=self.weights(most_parts)[0] if by_examples else 1,
            metric_limit=LOSS_LIMIT,
        )

    def numbers(self, cohort: int) -> tuple[int, int]:
        """Return the most colluders and the most dropouts in a round of ``cohort`` sites."""
        colluders = max(1, math.ceil(round(self.colluders * cohort, 6)))
        most = cohort - ((cohort + colluders) // 2 + 1)  # the others must sign
        return colluders, max(min(math.ceil(round(self.dropouts * cohort, 6)), most), 0)

    def plan(self, cohort: int) -> GraphPlan:
        """Return the graph degree and the thresholds of a round of ``cohort`` sites.

        Raises:
            IllegalJob: the cohort is too small or too large.
        """
        if cohort > self.max_sites:
            raise IllegalJob(
                f"a round of {cohort} sites is larger than max_sites = {self.max_sites}",
                f"privacy.secure_aggregation.max_sites = {cohort}, or a smaller rounds.cohort",
            )
        colluders, dropouts = self.numbers(cohort)
        try:
            return plan_graph(cohort, colluders, dropouts)
        except ParameterError:
            raise IllegalJob(
                f"secure aggregation of {cohort} sites, {colluders} of which may collude, "
                "protects nobody",
                f"at least {FEWEST} sites a round, and a smaller share of colluders",
            ) from None
