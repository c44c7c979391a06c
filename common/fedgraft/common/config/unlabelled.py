"""What a job must not ask for where no label is predicted: that there are some, or an own head."""

from typing import TYPE_CHECKING

from fedgraft.common.section import IllegalJob
from fedgraft.common.tasks import TASKS

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job
    from fedgraft.common.config.simulation import Simulation

__all__ = ["check_unlabelled"]


def check_unlabelled(job: "Job") -> None:
    """Whether a job whose task predicts tokens or patches means something.

    Raises:
        IllegalJob: it asks for something that only labels have.
    """
    task, target = job.job.task, TASKS[job.job.task].target
    if job.measures.size:
        raise IllegalJob(
            f"{task} predicts {target}, which have neither scores nor groups",
            "leave evaluation.score_bins, data.group and data.groups out",
        )
    if job.job.heads:
        raise IllegalJob(f"{task} has no labels to divide into heads", "leave job.heads out")
    if target == "patches" and job.training.label_smoothing:
        raise IllegalJob(f"{task} has no labels to smooth", "leave training.label_smoothing out")
    if target == "tokens" and job.method.head != "frozen":
        raise IllegalJob(
            f"the head of {task} is the backbone's own, as large as its vocabulary",
            'method.kind = "lora" with method.head = "frozen"',
        )
    if target == "tokens" and job.training.dropout:
        raise IllegalJob(
            f"training.dropout acts inside a head that trains, and that of {task} is frozen",
            "training.dropout = 0; method.dropout acts on the low-rank path",
        )
    if job.training.distillation is not None:
        raise IllegalJob(
            f"what a teacher says of all {target} of {task} would not fit on a site's disk",
            "leave training.distillation out",
        )
    stopping = job.rounds.early_stopping
    if stopping is not None and stopping.metric == "macro_f1":
        raise IllegalJob(
            f"{task} has no macro F1 to stop early by", 'rounds.early_stopping.metric = "loss"'
        )
    if job.simulation is not None:
        _check_simulation(job.simulation, task)


def _check_simulation(simulation: "Simulation", task: str) -> None:
    if simulation.partition.kind == "dirichlet":
        raise IllegalJob(
            f'partition.kind = "dirichlet" deals labels unevenly, and {task} has none',
            'simulation.partition = { kind = "natural" }, one file or folder a site, or "iid"',
        )
    if simulation.faults.poisons_labels:
        raise IllegalJob(
            f'faults.poison = "labels" gives sites wrong labels, and {task} has none',
            'simulation.faults.poison = "sign-flip", "noise" or "nan"',
        )
