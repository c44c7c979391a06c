"""The check of settings that do not work together, in one place.

The ``refuses`` of a task, a rule or a method lists the features of a job that it does not support,
with a reason and a replacement. ``FEATURES`` maps a feature's name to a test whether a job has it.
Two other settings that contradict each other, without a task, rule or method, are checked below in
functions of their own.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fedgraft.common.aggregation import RULES
from fedgraft.common.config.augmentation import Augmentation
from fedgraft.common.config.sections import LOSS
from fedgraft.common.section import IllegalJob

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job

__all__ = ["FEATURES", "SCALE", "check_compatible", "refusal_of"]

SCALE = 0.1  # the largest value of a statistic that travels beside an adapter


def _augmented(kind: str) -> Callable[["Job"], bool]:
    return lambda job: bool(getattr(job.training.augmentation, kind, None))


def _largest_rank(job: "Job") -> int:
    return max(job.simulation.ranks, default=0) if job.simulation is not None else 0


FEATURES: dict[str, Callable[["Job"], bool]] = {
    "counts_beside": lambda job: bool(job.evaluation.score_bins or job.data.groups),
    "heads": lambda job: bool(job.job.heads),
    "label_smoothing": lambda job: job.training.label_smoothing > 0,
    "trained_head": lambda job: job.method.head != "frozen",
    "head_dropout": lambda job: job.training.dropout > 0,
    "distillation": lambda job: job.training.distillation is not None,
    "early_stopping": lambda job: job.rounds.early_stopping is not None,
    "dirichlet": lambda job: _partition(job) == "dirichlet",
    "wrong_labels": lambda job: bool(job.simulation and job.simulation.faults.poisons_labels),
    "domain": lambda job: job.training.domain is not None,
    "consolidation": lambda job: job.training.consolidation is not None,
    **{f"augmentation.{kind}": _augmented(kind) for kind in Augmentation.model_fields},
    "start": lambda job: job.start is not None,
    "no_factors": lambda job: not job.method.low_rank,
    "magnitudes": lambda job: job.method.magnitudes,
    "quantized_magnitudes": lambda job: job.method.magnitudes and job.backbone.bits > 0,
    "larger_ranks": lambda job: _largest_rank(job) > job.method.low_rank,
    "secure_aggregation": lambda job: job.privacy.secure_aggregation.enabled,
    # Features of commands, which call ``refusal_of``: no job has them.
    "selection": lambda job: False,
    "explanation": lambda job: False,
}


def check_compatible(job: "Job") -> None:
    """Check that all settings of ``job`` work together.

    Raises:
        IllegalJob: the first conflict, and its replacement.
    """
    job.task.check_keys(job.data.own_keys(job.task.own_keys))
    for feature, has in FEATURES.items():
        if has(job) and (refused := refusal_of(job, feature)):
            raise IllegalJob(*refused)
    _check_statistics(job)
    _check_start(job)
    _check_early_stopping(job)
    _check_simulation(job)


def refusal_of(job: "Job", feature: str) -> tuple[str, str] | None:
    """Return the reason and the hint if the task, rule or method refuses ``feature``; else None."""
    owners = (job.task.refuses, job.rule.refuses, job.method.refuses)
    for refuses in owners:
        if feature in refuses:
            words = _words(job, feature)
            what, hint = refuses[feature]
            return what.format(**words), hint.format(**words)
    return None


def _words(job: "Job", feature: str) -> Mapping[str, object]:
    """Return the words that a refusal text can contain."""
    sums = ", ".join(f'"{name}"' for name, rule in RULES.items() if rule.needs == "sum")
    return {
        "task": job.job.task,
        "rule": job.aggregation.rule,
        "method": job.method.kind,
        "beside": feature,
        "rules_of_sums": sums,
        "largest_rank": _largest_rank(job),
    }


def _partition(job: "Job") -> str | None:
    return None if job.simulation is None else job.simulation.partition.kind


def _check_statistics(job: "Job") -> None:
    """Check that statistics beside updates stay a plain mean and are not clipped."""
    for kind in ("domain", "consolidation"):
        if getattr(job.training, kind) is None:
            continue
        server, masked = job.aggregation.server_optimizer, job.privacy.secure_aggregation
        if server.kind != "none" or server.learning_rate != 1:
            raise IllegalJob(
                f"training.{kind} needs the plain mean over sites, of their statistics too",
                'aggregation.rule = "fedavg" with server_optimizer.kind = "none"',
            )
        if masked.enabled and masked.clip < SCALE:
            raise IllegalJob(
                f"statistics of training.{kind} are up to {SCALE}, and clip is {masked.clip}",
                f"privacy.secure_aggregation.clip = {SCALE}",
            )


def _check_start(job: "Job") -> None:
    """Check that the earlier head, if the job wants it, can get to where a head trains."""
    if job.start is not None and job.start.head and job.method.head == "local":
        raise IllegalJob(
            "start.head = true brings an earlier head, and local heads never travel: it would be "
            "lost",
            "start.head = false: a new head at each site; or method.head = "
            '"shared", which goes on from it',
        )


def _check_early_stopping(job: "Job") -> None:
    """Check that the watched metric is measured, and that every site can go back to the best."""
    stopping = job.rounds.early_stopping
    if stopping is None:
        return
    watched = dict.fromkeys((LOSS.key, *(metric.key for metric in job.task.watched)))
    if stopping.metric not in watched:
        raise IllegalJob(
            f"{job.job.task} has no {stopping.metric} to stop early by",
            "rounds.early_stopping.metric = " + " or ".join(f'"{key}"' for key in watched),
        )
    if not job.data.validation:
        raise IllegalJob(
            "early_stopping watches federated validation, and data.validation = 0 leaves none",
            "data.validation = 0.1",
        )
    if job.method.head == "local":
        raise IllegalJob(
            "early_stopping may go back to an earlier adapter, and local heads do not go back",
            'method.head = "shared", or no early_stopping',
        )


def _check_simulation(job: "Job") -> None:
    if job.simulation is None:
        return
    if job.training.distillation is not None and job.simulation.teacher is None:
        raise IllegalJob(
            "training.distillation needs a teacher at every site",
            'simulation.teacher = "path:MODEL", trained for the job\'s labels',
        )
    if job.privacy.secure_aggregation.enabled:
        job.simulation.faults.check_masked()
