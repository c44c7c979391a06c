"""FedSA-LoRA: the factors A are shared, each site keeps its own B.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (ICLR).

    A <- A + sum_i p_i (A_i - A),   B_i stays at site i

In their analysis A learns what all data have in common and B what is a client's own. The model of a
site is W0 + B_i A with its own B_i: there is no global model of low rank, and what travels is about
half of an adapter.
"""

from dataclasses import dataclass

from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.layout import Layout, is_factor_b


@dataclass(frozen=True)
class FedSa(MeanRule):
    """Everything but the factors B travels; those train and stay."""

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Factors A and the head."""
        return tuple(name for name in layout.names if not is_factor_b(name))
