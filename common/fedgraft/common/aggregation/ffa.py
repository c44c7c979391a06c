"""FFA-LoRA: A is drawn once, equal everywhere and frozen; only B and the head train and travel.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (ICLR).

    A_i = A fixed,   B <- B + sum_i p_i (B_i - B)

With one A for all, mean(B A) = mean(B) A: averaging is exact, and a round moves about half the
bytes. A comes from a seed hashed from the job's and is compared by hash before the first round.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.layout import Layout, is_factor_a
from fedgraft.common.section import Refuses


@dataclass(frozen=True)
class Ffa(MeanRule):
    """Everything but the factors A trains and travels."""

    refuses: ClassVar[Refuses] = {
        "start": (
            'rule "{rule}" draws its frozen factors from the seed, and [start] brings others',
            'aggregation.rule = "fedavg"',
        ),
        "no_factors": (
            'rule "{rule}" freezes LoRA\'s factor A, and method.kind = "{method}" has none',
            'aggregation.rule = "fedavg", or method.kind = "lora"',
        ),
        "magnitudes": (
            'rule "{rule}" averages exactly because a weight is linear in B, and with '
            "method.dora it is not",
            'aggregation.rule = "fedavg", or method.dora = false',
        ),
        "consolidation": (
            'rule "{rule}" sends only one factor of each pair, and consolidation holds all',
            'aggregation.rule = "fedavg"',
        ),
    }

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Factors B and the head."""
        return tuple(name for name in layout.names if not is_factor_a(name))
