"""The job: one frozen object that the coordinator, the sites and the simulation share.

This file defines only the meaning of a job. ``jobfile.py`` reads a job from TOML, applies overrides
and explains errors. An existing ``Job`` is consistent: a job whose settings do not work together
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
    """One job; all its random numbers are derived from ``job.seed``."""

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
        # A later change of a default must not change this job. The section is frozen for others.
        self.__dict__["data"] = self.data.with_own_keys(self.task.own_keys)
        check_compatible(self)
        if self.simulation is not None and self.simulation.sites is not None:
            self.check_sites(self.simulation.sites)
        elif self.rounds.cohort is not None:
            self._check_cohort(self.rounds.cohort)
        return self

    @property
    def task(self) -> Task:
        """Return the task."""
        return TASKS[self.job.task]

    @property
    def rule(self) -> Rule:
        """Return the aggregation rule."""
        return RULES[self.aggregation.rule]

    @property
    def keeps_own(self) -> bool:
        """Return whether each site keeps a part of its model that it does not send."""
        return self.method.head == "local" or self.rule.keeps_own

    @property
    def settings(self) -> Settings:
        """Return the settings for the conversion of rows to examples and for the measures."""
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
            heads=self.job.head_of,
            keys=self.data.own_keys(self.task.own_keys),
        )

    @property
    def measures(self) -> Measures:
        """Return the measures of an evaluation of this job."""
        return self.task.measures(self.settings)

    def check_sites(self, sites: int) -> None:
        """Check that rounds can work with ``sites`` sites.

        Raises:
            IllegalJob: the cohort would be too large or too small.
        """
        self.rounds.check_sites(sites)
        self._check_cohort(self.rounds.cohort_size(sites))
        if self.rounds.early_stopping:  # all sites evaluate
            self._check_cohort(sites)

    def _check_cohort(self, cohort: int) -> None:
        if self.privacy.secure_aggregation.enabled:
            self.privacy.secure_aggregation.plan(cohort)

    def for_sites(self) -> "Job":
        """Return the job in the form for sites: without the names of the coordinator's files.

        Sites may know that the job starts from an earlier adapter. They get the adapter itself in
        round 1.
        """
        start = None
        if self.start is not None:
            start = self.start.model_copy(update={"adapter": "of an earlier run"})
        return self.model_copy(update={"simulation": None, "start": start})
