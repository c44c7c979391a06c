"""FFA-LoRA: A is drawn once, equal everywhere and frozen; only B and the head train and travel.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (ICLR).

    A_i = A fixed,   B <- B + sum_i p_i (B_i - B)

With one A for all, mean(B A) = mean(B) A: averaging is exact, and a round moves about half the
bytes. A comes from a seed hashed from the job's and is compared by hash before the first round.
"""

from dataclasses import dataclass

from fedgraft.common.aggregation.base import MeanRule
from fedgraft.common.layout import Layout, is_factor_a


@dataclass(frozen=True)
class Ffa(MeanRule):
    """Everything but the factors A trains and travels."""

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Factors B and the head."""
        return tuple(name for name in layout.names if not is_factor_a(name))
