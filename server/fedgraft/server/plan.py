"""The plan of a run: which tensors travel, and what every message to a site says."""

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
    """What a job means for this federation: which tensors travel, what every message says.

    With ``halfway`` a round in clear goes on after a crash from the replies that had come.
    """

    job: Job
    session: str
    exchanged: Layout
    request: PlanRequest
    masking: Masking | None = None
    halfway: Halfway | None = None


def make_plan(job: Job, bench: Workbench, session: str, masking: Masking | None = None) -> Plan:
    """Which tensors travel under the job's rule and head policy, and the invitation to sites."""
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
