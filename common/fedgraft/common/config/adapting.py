"""What a job must not ask for whose sites send statistics of their examples beside updates."""

from typing import TYPE_CHECKING

from fedgraft.common.section import IllegalJob
from fedgraft.common.tasks import TASKS

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job

__all__ = ["SCALE", "check_domain", "check_plain_mean"]

SCALE = 0.1  # the largest value of a statistic that travels (``domain.py``)


def check_domain(job: "Job") -> None:
    """Whether a job that adapts to a domain can.

    Raises:
        IllegalJob: there are no labels that could be missing, or the method trains no features.
    """
    if TASKS[job.job.task].target != "label":
        raise IllegalJob(
            f"{job.job.task} has no labels that could be missing", "leave training.domain out"
        )
    if job.method.kind == "head":
        raise IllegalJob(
            'method.kind = "head" leaves all features as they are: nothing could be aligned',
            'method.kind = "lora" or "partial", or no training.domain',
        )


def check_plain_mean(job: "Job") -> None:
    """Whether a mean of statistics stays a mean.

    Raises:
        IllegalJob: the rule is another, or statistics would be clipped.
    """
    kind = "domain" if job.training.domain is not None else "consolidation"
    if job.aggregation.rule == "ffa" and kind == "consolidation":
        raise IllegalJob(
            'rule "ffa" sends only one factor of each pair, and consolidation holds all',
            'aggregation.rule = "fedavg"',
        )
    server = job.aggregation.server_optimizer
    if job.aggregation.rule == "median" or server.kind != "none" or server.learning_rate != 1:
        raise IllegalJob(
            f"training.{kind} needs the plain mean over sites, of their statistics too",
            'aggregation.rule = "fedavg" with server_optimizer.kind = "none"',
        )
    masked = job.privacy.secure_aggregation
    if masked.enabled and masked.clip < SCALE:
        raise IllegalJob(
            f"statistics of training.{kind} are up to {SCALE}, and clip is {masked.clip}",
            f"privacy.secure_aggregation.clip = {SCALE}",
        )
