"""The checks of this site's data against a job, and of what it refused before."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft.client.doctor.local import OK, WARN, Finding, Patient
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError

if TYPE_CHECKING:
    from fedgraft.client.data.rows import SplitRows

__all__ = ["job_data", "refusals"]

USES = {
    "train": "rows to train on", "validation": "to validate on", "test": "to test on",
}  # fmt: skip


def job_data(patient: Patient) -> Finding:
    """Read and encode this site's rows as training for the job would, and report what was read."""
    if not patient.job:
        return Finding("job", OK, "none to try: fedgraft site doctor --job JOB")
    from fedgraft.client.data.findings import examine
    from fedgraft.client.data.rows import read_split

    job, chosen = _job(patient), patient.config.data
    files = {"train": chosen.train, "validation": chosen.validation, "test": chosen.test}
    rows = {
        split: read_split(
            path,
            job,
            columns=chosen.columns,
            labels=chosen.labels,
            labelled=chosen.labelled or split != "train",
        )
        for split, path in files.items()
        if path
    }
    counts = ", ".join(f"{len(one.dataset):,} {USES[split]}" for split, one in rows.items())
    train, validation, test = ([rows[split]] if split in rows else [] for split in files)
    notes = examine(train, test, validation).notes() + _encode(patient, job, rows.values())
    said = f"{job.job.name}: {counts}"
    return Finding("job", WARN if notes else OK, said, " ".join(notes))


def _encode(patient: Patient, job: Job, rows: Iterable["SplitRows"]) -> list[str]:
    """Encode the rows with the job's backbone; return a note if it is not here.

    Raises:
        FedgraftError: the backbone cannot read the rows.
    """
    from fedgraft.client.data.cache import open_store
    from fedgraft.client.data.rows import encode
    from fedgraft.common.adapters.model import cache_folder, open_processor

    try:
        backbone, processor = open_processor(job)
    except BackboneError as error:
        return [f"The rows were not encoded: {error}."]
    cache = patient.config.cache
    store = open_store(cache_folder() / "encoded", cache.memory, cache.disk)
    for one in rows:
        encode(one.dataset, processor, job, store=store, key=backbone.fingerprint)
    return []


def refusals(patient: Patient) -> Finding:
    """Report what this site refused last."""
    from fedgraft.client.policy.reasons import last_reasons

    reasons = last_reasons(patient.state, 1)
    if not reasons:
        return Finding("refusals", OK, "none")
    last = reasons[0]
    why = " ".join(filter(None, (f"{last.why}.", last.hint and f"Hint: {last.hint}.")))
    said = f"{last.stage} at {last.at}: {last.code}"
    return Finding("refusals", WARN, said, f"{why} More: fedgraft site status")


def _job(patient: Patient) -> Job:
    """Return the job in a file, or of a run that the coordinator has proposed here.

    Raises:
        InputError: there is no such file, and no such run.
    """
    if Path(patient.job).is_file():
        from fedgraft.common.config.jobfile import load_job

        return load_job(Path(patient.job))
    from fedgraft.client.membership.state_files import APPROVALS
    from fedgraft.client.policy.approvals import Agreements

    agreement = Agreements(patient.state / APPROVALS).named(patient.job)
    return Job.model_validate_json(agreement.job)
