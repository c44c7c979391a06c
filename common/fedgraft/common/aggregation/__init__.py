"""The aggregation rules: one file for each rule, and the table of all rules."""

from typing import TYPE_CHECKING, Literal

from fedgraft.common.aggregation.base import Collector, Rule, RunningMean
from fedgraft.common.aggregation.fedavg import FedAvg
from fedgraft.common.aggregation.fedsa import FedSa
from fedgraft.common.aggregation.ffa import Ffa
from fedgraft.common.aggregation.median import Median

__all__ = ["RULES", "Collector", "Rule", "RuleName", "RunningMean"]

RULES: dict[str, Rule] = {"fedavg": FedAvg(), "ffa": Ffa(), "fedsa": FedSa(), "median": Median()}

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]
