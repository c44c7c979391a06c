"""FedAvg over adapters: factors and shared heads are averaged element by element.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data";
for LoRA: Zhang et al. 2023, "Towards Building the Federated GPT" (FedIT).

    x <- x + sum_i p_i (x_i - x),   p_i = n_i / sum_j n_j  or  1/n

The average of the factors is not the factors of the average: mean(B) mean(A) differs from
mean(B A). The difference is the rule's aggregation error; ``ffa`` has none.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.adapters import Layout
from fedgraft.server.aggregation.base import RunningMean


@dataclass(frozen=True)
class FedAvg:
    """Every tensor of the adapter trains and travels."""

    needs: Literal["sum", "individual"] = "sum"

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """All of them."""
        return layout.names

    def collect(self, size: int) -> RunningMean:
        """The weighted mean."""
        return RunningMean(size)

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean itself."""
        return combined
