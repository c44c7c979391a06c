"""The job file: what to train, in one frozen object that coordinator, sites and simulation share.

Only the meaning of a job lives here; reading it from TOML, overriding it and explaining what is
wrong with it is ``jobfile.py``. A ``Job`` that exists is consistent: what does not go together
does not validate (``compatibility.py``).
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedgraft.common.aggregation import RULES
from fedgraft.common.aggregation.base import Rule
from fedgraft.common.config.compatibility import check_compatible
from fedgraft.common.config.data import Data
from fedgraft.common.config.evaluation import Evaluation
from fedgraft.common.config.sections import Aggregation, Backbone, General, Rounds, Start
from fedgraft.common.config.simulation import Simulation
from fedgraft.common.config.training import Training
from fedgraft.common.encoding import Settings
from fedgraft.common.methods import Method
from fedgraft.common.metrics.evaluation import Measures
from fedgraft.common.privacy import Privacy
from fedgraft.common.section import Section
from fedgraft.common.tasks import TASKS, Task

__all__ = ["Job"]


class Job(Section):
    """One job; everything random in it is derived from ``job.seed``."""

    job: General
    backbone: Backbone
    method: Annotated[Method, Field(discriminator="kind")]
    training: Training = Training()
    start: Start | None = None
    rounds: Rounds = Rounds()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    simulation: Simulation | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        check_compatible(self)
        if self.simulation is not None and self.simulation.sites is not None:
            self.check_sites(self.simulation.sites)
        elif self.rounds.cohort is not None:
            self._check_cohort(self.rounds.cohort)
        return self

    @property
    def task(self) -> Task:
        """The kind of problem."""
        return TASKS[self.job.task]

    @property
    def rule(self) -> Rule:
        """How updates combine."""
        return RULES[self.aggregation.rule]

    @property
    def keeps_own(self) -> bool:
        """Whether each site keeps a part of its model to itself."""
        return self.method.head == "local" or self.rule.keeps_own

    @property
    def settings(self) -> Settings:
        """What decides how rows become examples, and what is measured on them."""
        return Settings(
            labels=self.job.labels,
            seed=self.job.seed,
            max_length=self.data.max_length,
            masked=self.data.masked,
            seconds=self.data.seconds,
            normalize=self.data.normalize,
            score_bins=self.evaluation.score_bins,
            groups=self.data.groups,
            min_group=self.evaluation.min_group,
            keys=self.data.own_keys(self.task.keys),
        )

    @property
    def measures(self) -> Measures:
        """What an evaluation of this job counts."""
        return self.task.measures(self.settings)

    def check_sites(self, sites: int) -> None:
        """Whether rounds can work with ``sites`` sites.

        Raises:
            IllegalJob: the cohort would be too large or too small.
        """
        self.rounds.check_sites(sites)
        self._check_cohort(self.rounds.cohort_size(sites))
        if self.rounds.early_stopping:  # all of them evaluate
            self._check_cohort(sites)

    def _check_cohort(self, cohort: int) -> None:
        if self.privacy.secure_aggregation.enabled:
            self.privacy.secure_aggregation.plan(cohort)

    def for_sites(self) -> "Job":
        """The job as sites get it: without what names the coordinator's files.

        That it goes on from an earlier adapter they may know; which, they get in round 1.
        """
        start = None
        if self.start is not None:
            start = self.start.model_copy(update={"adapter": "of an earlier run"})
        return self.model_copy(update={"simulation": None, "start": start})
