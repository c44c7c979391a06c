"""The plan of a run: the exchanged tensors, and the content of every message to a site."""

from dataclasses import dataclass

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.aggregation import RULES
from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.payloads import PlanRequest
from fedgraft.server.protocol.clear import Halfway
from fedgraft.server.protocol.masked import Masking

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The plan of a job: the exchanged tensors, and the content of every message to a site.

    With ``halfway``, a round in clear goes on after a crash with the replies that were saved.
    """

    job: Job
    session: str
    exchanged: Layout
    request: PlanRequest
    masking: Masking | None = None
    halfway: Halfway | None = None


def make_plan(job: Job, bench: Workbench, session: str, masking: Masking | None = None) -> Plan:
    """Return the plan: the tensors that rule and head policy exchange, and the invitation."""
    rule = RULES[job.aggregation.rule]
    local = set(bench.local.names)
    names = tuple(name for name in rule.exchanges(bench.layout) if name not in local)
    exchanged = bench.layout.only(names)
    request = PlanRequest(
        session=session,
        job=job.for_sites().model_dump_json(),
        backbone=bench.backbone.fingerprint,
        layout=exchanged.fingerprint,
        names=names,
        fixed=bench.fixed_hash({*names, *local}),
    )
    masked = job.privacy.secure_aggregation.enabled
    return Plan(job, session, exchanged, request, masking if masked else None)
