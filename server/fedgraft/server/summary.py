"""What can be said of a run from its folder alone: parameters, bytes, settings."""

from typing import Any

from fedgraft.common.jobfile import dump_job
from fedgraft.common.workbench import Workbench
from fedgraft.server.rounds import Plan
from fedgraft.server.runs import Run

__all__ = ["bytes_per_site_round", "run_facts"]


def run_facts(run: Run, bench: Workbench, plan: Plan) -> dict[str, Any]:
    """The part of a summary that does not depend on where the sites were."""
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
            "backbone": job.backbone.source,
        },
        "job_toml": dump_job(job),
        "environment": run.environment(),
        "rounds": len(history),
        "trained_parameters": plan.exchanged.size + bench.local.size,
        "total_parameters": bench.backbone_parameters,
        "bytes_up_per_site_round": up,
        "bytes_down_per_site_round": down,
        "protection": "none",
    }


def bytes_per_site_round(history: list[dict[str, Any]]) -> tuple[int, int]:
    """Mean bytes (up, down) of one site in one round, evaluation included, as measured."""
    asked = sum(line["asked"] for line in history)
    up = sum(line["bytes_up"] for line in history)
    down = sum(line["bytes_down"] for line in history)
    return round(up / max(asked, 1)), round(down / max(asked, 1))
