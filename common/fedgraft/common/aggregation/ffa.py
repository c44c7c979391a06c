"""FFA-LoRA: A is drawn once, equal at all sites, and frozen; sites train and send B and the head.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (ICLR).

    A_i = A fixed,   B <- B + sum_i p_i (B_i - B)

All sites have the same A, so mean(B A) = mean(B) A: the average is exact. A round also sends about
half as many bytes. A comes from a seed that is a hash of the job's seed. Before the first round
each site compares the hash of its A with the coordinator's hash.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.layout import Layout, is_factor_a
from fedgraft.common.section import Refuses

__all__ = ["Ffa"]


@dataclass(frozen=True)
class Ffa(MeanRule):
    """The FFA rule: sites train and send every tensor except the factors A."""

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
        """Return the names of the factors B and of the head."""
        return tuple(name for name in layout.names if not is_factor_a(name))
