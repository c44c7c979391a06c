"""The checks of this site's data against a job, and of what it refused before."""

from pathlib import Path

from fedgraft.client.doctor.local import OK, WARN, Finding, Patient
from fedgraft.common.config.job import Job

__all__ = ["job_data", "refusals"]


def job_data(patient: Patient) -> Finding:
    """Read this site's rows as training for the job would, and report what was read."""
    if not patient.job:
        return Finding("job", OK, "none to try: fedgraft site doctor --job JOB")
    from fedgraft.client.data.findings import examine
    from fedgraft.client.data.rows import read_split

    job, chosen = _job(patient), patient.config.data
    rows = [
        read_split(
            path,
            job,
            columns=chosen.columns,
            labels=chosen.labels,
            labelled=chosen.labelled or split == "test",
        )
        for split, path in (("train", chosen.train), ("test", chosen.test))
        if path
    ]
    counts = [f"{len(one.dataset):,}" for one in rows]
    said = f"{job.job.name}: {counts[0]} rows to train on" + "".join(
        f", {count} to test on" for count in counts[1:]
    )
    notes = examine(rows[:1], rows[1:]).notes()
    return Finding("job", WARN if notes else OK, said, " ".join(notes))


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
