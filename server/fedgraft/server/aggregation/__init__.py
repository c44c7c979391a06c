"""How updates combine: one file per rule, and the optimiser that applies what they yield."""

from fedgraft.server.aggregation.base import Collector, Rule, RunningMean
from fedgraft.server.aggregation.fedavg import FedAvg
from fedgraft.server.aggregation.fedsa import FedSa
from fedgraft.server.aggregation.ffa import Ffa
from fedgraft.server.aggregation.median import Median

__all__ = ["RULES", "Collector", "Rule", "RunningMean"]

RULES: dict[str, Rule] = {"fedavg": FedAvg(), "ffa": Ffa(), "fedsa": FedSa(), "median": Median()}
