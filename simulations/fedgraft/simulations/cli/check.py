"""``fedgraft check``: check a job, its backbone and its simulation's data, without training.

If simulations are not installed, the coordinator's verb is used, which does not check sites.
"""

from typing import TYPE_CHECKING, Any

from fedgraft.common.console import Console
from fedgraft.server.cli.jobs import check_job, show_check
from fedgraft.server.cli.options import JobFile, Json, Overrides

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job

__all__ = ["check"]


def check(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Validate a job, its backbone and its data without training; say what it will cost."""
    from fedgraft.common.config.jobfile import load_job

    loaded = load_job(job, tuple(overrides or ()))
    facts = check_job(loaded)
    if loaded.simulation is not None:
        facts |= _simulated_sites(loaded)
    show_check(Console(as_json=as_json), facts, loaded.rounds.count)


def _simulated_sites(job: "Job") -> dict[str, Any]:
    """Read and validate all data of the job's simulation; its sites and their examples."""
    from fedgraft.simulations.preparation import prepare

    prepared = prepare(job)
    sites = [
        {"name": site.name, "examples": site.examples, "test_examples": site.test_examples}
        for site in prepared.sites
    ]
    notes = list(prepared.notes)
    return {"sites": sites, "skipped_files": prepared.skipped, "data_notes": notes}
