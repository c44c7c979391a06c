"""FedAvg for adapters: factors and shared heads are averaged element by element.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data";
for LoRA: Zhang et al. 2023, "Towards Building the Federated GPT" (FedIT).

    x <- x + sum_i p_i (x_i - x),   p_i = n_i / sum_j n_j  or  1/n

The product of the averaged factors is not the average of the products: mean(B) mean(A) differs from
mean(B A). This difference is the rule's aggregation error; the rule ``ffa`` has no such error.
"""

from dataclasses import dataclass

from fedgraft.common.aggregation.base import MeanRule

__all__ = ["FedAvg"]


@dataclass(frozen=True)
class FedAvg(MeanRule):
    """The FedAvg rule: sites train and send every tensor of the adapter."""
