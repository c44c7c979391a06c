"""Preparation before the first round: make the sites, open the backbone, check all examples.

Nothing is written for a run before the preparation has succeeded. Sites and the results of their
checks are found again by their hash, so that a second run of the same job begins at once.
"""

import hashlib
from collections.abc import Sequence

from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.participant import open_participant
from fedgraft.client.training.augmentation import open_augmentation
from fedgraft.common.adapters.initial import starting_point
from fedgraft.common.adapters.model import (
    cache_folder,
    choose_device,
    open_processor,
    open_workbench,
)
from fedgraft.common.config.job import Job
from fedgraft.common.console import Console
from fedgraft.common.errors import InputError
from fedgraft.common.files import write_text
from fedgraft.server.plan import make_plan
from fedgraft.simulations.baselines.compare import head_only_job
from fedgraft.simulations.data.partition import PreparedSites, prepare_sites
from fedgraft.simulations.grid.engine import Nodes, choose_sites_per_pass, make_nodes
from fedgraft.simulations.grid.ray import require_ray
from fedgraft.simulations.grid.workers import Workers

__all__ = ["inputs_of", "prepare"]

FEW = 64  # sites whose examples are read in one task


def prepare(job: Job, engine: str = "local", console: Console | None = None) -> PreparedSites:
    """Check a job before anything is written for its run; return its sites.

    Workers that are forked later share the objects that are loaded here.

    Raises:
        InputError: the job, its data or its backbone is wrong.
    """
    if engine == "ray":
        _refuse_faults(job)
        require_ray()
    prepared = prepare_sites(job, cache_folder() / "sites")
    headed = "head_only" in prepared.settings.baselines and job.task.head_alone
    wanted = (job, head_only_job(job)) if headed else (job,)
    if job.training.augmentation is not None:
        open_augmentation(job.training.augmentation)
    bench = open_workbench(job)
    starting_point(job, bench, make_plan(job, bench, "").exchanged)
    device = str(choose_device(prepared.settings.device))
    for each in wanted:  # opened here, so that forked workers share them
        open_stack(each, device=device)
    nodes = make_nodes(job, prepared, states="", device=device)
    choose_sites_per_pass(job, nodes)
    _check_examples(job, prepared, nodes, console or Console(quiet=True))
    return prepared


def _refuse_faults(job: Job) -> None:
    if job.simulation is not None and job.simulation.faults.any:
        raise InputError(
            "faults are played by the local engine, which has a clock of its own",
            hint="--engine local, or a job without [simulation.faults]",
        )


def _check_examples(job: Job, prepared: PreparedSites, nodes: Nodes, console: Console) -> None:
    """Read every site's examples once; a file beside the sites records the success."""
    backbone = open_processor(job)[0].fingerprint
    facts = job.model_dump_json(include={"job": {"task", "labels"}, "data": True})
    checked = (
        prepared.folder / f"checked-{hashlib.sha256(f'{facts}{backbone}'.encode()).hexdigest()}"
    )
    if checked.exists() and len(nodes) > FEW:
        return
    groups = [range(at, min(at + FEW, len(nodes))) for at in range(0, len(nodes), FEW)]
    # A few sites are read in this process, so that workers that are forked later share them.
    count = prepared.settings.workers if len(groups) > 1 else 0
    with Workers(count, device="cpu") as workers:
        tasks = [workers.submit(_read_examples, job, nodes, group) for group in groups]
        with console.steps("reading sites", len(tasks) if len(tasks) > 1 else 0) as steps:
            for group, task in zip(groups, tasks, strict=True):
                task.result()
                if len(tasks) > 1:
                    steps.done(f"{group.stop:,} of {len(nodes):,} sites")
    write_text(checked, "")


def _read_examples(job: Job, nodes: Nodes, sites: Sequence[int]) -> None:
    for site in sites:
        splits = open_participant(nodes[site]).splits(job)
        for examples in (splits.train, splits.validation, splits.test):
            len(examples)


def inputs_of(job: Job, prepared: PreparedSites, engine: str) -> dict[str, str]:
    """Return the inputs that must be unchanged when a run of ``job`` is resumed."""
    backbone = open_workbench(job).backbone.fingerprint
    return {"data": prepared.folder.name, "backbone": backbone, "engine": engine}
