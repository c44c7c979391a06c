"""The adapter before round 1: the backbone's initial adapter, or an earlier run's adapter."""

from pathlib import Path

from fedgraft.common.adapters.fisher import ANCHOR, OLD, load_fisher
from fedgraft.common.adapters.model import Workbench
from fedgraft.common.adapters.peft_folder import has_head, labels_of, read_adapter
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError
from fedgraft.common.layout import Layout, Vector

__all__ = ["starting_point"]


def starting_point(job: Job, bench: Workbench, exchanged: Layout) -> Vector:
    """Return the exchanged adapter before round 1, float32 [exchanged.size].

    Raises:
        InputError: ``job.start`` names no adapter that fits the job, its head would be lost or
            answer with other labels, or it lacks the Fisher information that
            ``training.consolidation`` needs.
    """
    consolidation = job.training.consolidation
    if job.start is None:
        if consolidation is not None and consolidation.weight:
            raise InputError(
                "training.consolidation.weight holds to an earlier adapter, and there is none",
                hint='start = { adapter = "FOLDER" }, or weight = 0 to measure for a later job',
            )
        return bench.initial_of(exchanged)
    folder = Path(job.start.adapter)
    if not folder.is_dir():
        raise InputError(
            f"start.adapter: no folder {folder}", hint="one that `fedgraft export RUN` wrote"
        )
    if job.start.head:
        _check_head(job, folder)
    vector = read_adapter(bench, folder, head=job.start.head)
    if consolidation is not None and consolidation.weight:
        layout, carried = bench.layout, bench.carried
        vector[layout.slices[OLD]] = load_fisher(folder, carried)
        vector[layout.slices[ANCHOR]] = layout.part(vector, carried)
    return bench.layout.part(vector, exchanged)


def _check_head(job: Job, folder: Path) -> None:
    """Check that the head of the adapter in ``folder`` goes on in the job, label by label."""
    if not has_head(folder):
        return
    if job.method.head == "frozen":
        raise InputError(
            f"the adapter in {folder} has a trained head, and method.head is frozen: it would be "
            "lost",
            hint='method.head = "shared"; or start.head = false, to leave it behind',
        )
    known = labels_of(folder)
    if known is not None and known != job.job.labels:
        same = sorted(known) == sorted(job.job.labels)
        raise InputError(
            f"the head of the adapter in {folder} is for "
            + ("the same labels in another order" if same else "other labels"),
            hint="start.head = false: a new head; or job.labels as the earlier job has them",
        )
