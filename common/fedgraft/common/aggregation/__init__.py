"""How updates combine: one file per rule, and the optimiser that applies what they yield."""

from fedgraft.common.aggregation.base import Collector, Rule, RunningMean
from fedgraft.common.aggregation.fedavg import FedAvg
from fedgraft.common.aggregation.fedsa import FedSa
from fedgraft.common.aggregation.ffa import Ffa
from fedgraft.common.aggregation.median import Median

__all__ = ["RULES", "Collector", "Rule", "RunningMean"]

RULES: dict[str, Rule] = {"fedavg": FedAvg(), "ffa": Ffa(), "fedsa": FedSa(), "median": Median()}
