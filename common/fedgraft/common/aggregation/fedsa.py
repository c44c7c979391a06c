"""FedSA-LoRA: the factors A are shared, each site keeps its own B.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (ICLR).

    A <- A + sum_i p_i (A_i - A),   B_i stays at site i

In their analysis A learns what all data have in common and B what is a client's own. The model of a
site is W0 + B_i A with its own B_i: there is no global model of low rank, and what travels is about
half of an adapter.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.layout import Layout, is_factor_b
from fedgraft.common.section import Refuses


@dataclass(frozen=True)
class FedSa(MeanRule):
    """Everything but the factors B travels; those train and stay."""

    keeps_own: ClassVar[bool] = True
    refuses: ClassVar[Refuses] = {
        "start": (
            'rule "{rule}" sends no factors B, and half of the adapter of [start] would be lost',
            'aggregation.rule = "fedavg"',
        ),
        "no_factors": (
            'rule "{rule}" shares LoRA\'s factor A and keeps its B, and this method has no such '
            "pairs",
            'aggregation.rule = "fedavg", or method.kind = "lora" without dora',
        ),
        "magnitudes": (
            "rule \"{rule}\" shares LoRA's factor A and keeps its B, and this method has DoRA's "
            "magnitudes",
            'aggregation.rule = "fedavg", or method.kind = "lora" without dora',
        ),
        "consolidation": (
            'rule "{rule}" sends only one factor of each pair, and consolidation holds all',
            'aggregation.rule = "fedavg"',
        ),
    }

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Factors A and the head."""
        return tuple(name for name in layout.names if not is_factor_b(name))

    def keeps(self, name: str) -> bool:
        """The factors B."""
        return is_factor_b(name)

    def card_note(self, *, own_parts: bool, shared_head: bool) -> str:
        """Whose factors B are in the folder."""
        if own_parts:
            return (
                "The factors B in this folder are this site's own and never left it; the factors A "
                "are the federation's."
            )
        head = "the shared head" if shared_head else "its head"
        return (
            "Only the factors A were shared: every site has factors B of its own, and those in "
            "this folder are zero. What it computes is the\n"
            f"backbone with {head}, until B is trained or put in from a site."
        )
