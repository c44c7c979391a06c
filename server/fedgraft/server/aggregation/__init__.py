"""How updates combine: one file per rule, and the optimiser that applies what they yield."""

from fedgraft.server.aggregation.base import Rule, RunningMean
from fedgraft.server.aggregation.fedavg import FedAvg
from fedgraft.server.aggregation.ffa import Ffa

__all__ = ["RULES", "Rule", "RunningMean"]

RULES: dict[str, Rule] = {"fedavg": FedAvg(), "ffa": Ffa()}
