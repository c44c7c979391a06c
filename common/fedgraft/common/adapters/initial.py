"""The adapter before round 1: the backbone's initial adapter, or an earlier run's adapter."""

from pathlib import Path

from fedgraft.common.adapters.fisher import ANCHOR, OLD, load_fisher
from fedgraft.common.adapters.model import Workbench
from fedgraft.common.adapters.peft_folder import read_adapter
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError
from fedgraft.common.layout import Layout, Vector

__all__ = ["starting_point"]


def starting_point(job: Job, bench: Workbench, exchanged: Layout) -> Vector:
    """Return the exchanged adapter before round 1, float32 [exchanged.size].

    Raises:
        InputError: ``job.start`` names no adapter that fits the job, or the adapter lacks the
            Fisher information that ``training.consolidation`` needs.
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
    vector = read_adapter(bench, folder, head=job.start.head)
    if consolidation is not None and consolidation.weight:
        layout, carried = bench.layout, bench.carried
        vector[layout.slices[OLD]] = load_fisher(folder, carried)
        vector[layout.slices[ANCHOR]] = layout.part(vector, carried)
    return bench.layout.part(vector, exchanged)
