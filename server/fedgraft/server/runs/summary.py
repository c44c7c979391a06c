"""The facts of a run that its folder alone gives: parameters, bytes, settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.backbones.load import public_source
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job
from fedgraft.server.plan import Plan
from fedgraft.server.runs.protection import protection_facts
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import kept_validation

__all__ = ["bytes_per_site_round", "partner_facts", "run_facts"]


def run_facts(run: Run, bench: Workbench, plan: Plan) -> dict[str, Any]:
    """Return the part of a summary that simulations and partner sites have in common."""
    job, history = plan.job, run.history()
    up, down = bytes_per_site_round(history)
    return {
        "run": run.name,
        "folder": str(run.folder),
        "status": "finished",
        "job": {
            "name": job.job.name,
            "task": job.job.task,
            "labels": list(job.job.labels),
            "method": job.method.kind,
            "rule": job.aggregation.rule,
            "backbone": public_source(job.backbone.source),
        },
        "job_toml": dump_job(_without_folders(job)),
        "environment": run.environment(),
        "rounds": len(history),
        "trained_parameters": plan.exchanged.of_model.size + bench.local.size,
        "total_parameters": bench.backbone_parameters,
        "bytes_up_per_site_round": up,
        "bytes_down_per_site_round": down,
        "protection": protection_facts(job, history),
    }


def partner_facts(run: Run, handed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the additional facts of partner sites: the sites with the result, its validation.

    ``handed`` is the result of ``hand_over``. Sites measure their own results locally, and do not
    report them.
    """
    history = run.history()
    kept = kept_validation(history, run.job.rounds.early_stopping)
    return {
        "seconds": sum(line["seconds"] for line in history),
        "partners": {**handed, "validation": kept},
    }


def _without_folders(job: Job) -> Job:
    """Return the job with file names instead of paths, because a report is passed on to others."""
    changes: dict[str, Any] = {
        "backbone": job.backbone.model_copy(update={"source": _named(job.backbone.source)})
    }
    if job.start is not None:
        named = {"adapter": _named(job.start.adapter)}
        changes["start"] = job.start.model_copy(update=named)
    if job.simulation is not None:
        test = job.simulation.test
        teacher = job.simulation.teacher
        paths = {
            "train": _named(job.simulation.train),
            "test": test and _named(test),
            "teacher": teacher and _named(teacher),
        }
        changes["simulation"] = job.simulation.model_copy(update=paths)
    return job.model_copy(update=changes)


def _named(source: str) -> str:
    """Return the last part of ``path:FOLDER/NAME`` or a path; other names are unchanged."""
    if source.startswith(("hf:", "builtin:", "manifest:")):
        return source
    kind = "path:" if source.startswith("path:") else ""
    return kind + Path(source).name


def bytes_per_site_round(history: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the measured mean bytes (up, down) of one site in one round with its evaluation."""
    asked = sum(line["asked"] for line in history)
    up = sum(line["bytes_up"] for line in history)
    down = sum(line["bytes_down"] for line in history)
    return round(up / max(asked, 1)), round(down / max(asked, 1))
