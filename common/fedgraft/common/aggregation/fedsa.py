"""FedSA-LoRA: sites share the factors A, and each site keeps its own factors B.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (ICLR).

    A <- A + sum_i p_i (A_i - A),   B_i stays at site i

In the analysis of the paper, A learns the features that all data share, and B learns the features
of one client's data. The model of a site is W0 + B_i A with its own B_i. So there is no global
model of low rank, and sites send about half of an adapter.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.layout import Layout, is_factor_b
from fedgraft.common.section import Refuses

__all__ = ["FedSa"]


@dataclass(frozen=True)
class FedSa(MeanRule):
    """The FedSA rule: sites train every tensor, and send all tensors except the factors B."""

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
        "early_stopping": (
            'early_stopping may go back to an earlier adapter, and under rule "{rule}" the sites\' '
            "own factors do not go back",
            'aggregation.rule = "fedavg", or no early_stopping',
        ),
        "consolidation": (
            'rule "{rule}" sends only one factor of each pair, and consolidation holds all',
            'aggregation.rule = "fedavg"',
        ),
    }

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Return the names of the factors A and of the head."""
        return tuple(name for name in layout.names if not is_factor_b(name))

    def keeps(self, name: str) -> bool:
        """Return whether ``name`` is a factor B."""
        return is_factor_b(name)

    def card_note(self, *, own_parts: bool, shared_head: bool) -> str:
        """Return a text that says which factors B the folder contains."""
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
