"""The last message of a run: every site gets the final adapter and the results of the rounds.

A site has seen the adapters of the rounds in which it was asked. It cannot know which of them was
the last or the best. Therefore every site gets the final adapter once, when the run is over. The
coordinator waits for an absent site as long as a killed site needs to come back. The event
``handed-over`` names the sites that have the adapter.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from fedgraft.common.layout import Vector
from fedgraft.common.messages.codec import Stage
from fedgraft.common.messages.payloads import PastRound, ResultRequest
from fedgraft.server.plan import Plan
from fedgraft.server.protocol.transport import SILENT, Transport
from fedgraft.server.runs.run_folder import Run

__all__ = ["hand_over"]

PATIENCE = 120.0  # seconds; a killed site is back within 90
PAUSE = 5.0  # seconds between two checks for sites that have come back


def hand_over(
    plan: Plan,
    transport: Transport,
    run: Run,
    final: Vector,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Send ``final``, the exchanged adapter, float32, to every site; return the ``sites`` with it.

    Known sites without it are ``missing``, with the reason. The function returns when as many sites
    have answered as were asked in the last round, or after ``PATIENCE``.
    """
    history = run.history()
    wanted = history[-1]["asked"] if history else 0
    until = clock() + min(PATIENCE, plan.job.rounds.deadline)
    answers: dict[str, str] = {}  # by site that answered: the failure, empty if it has the adapter
    again, sent = False, 0
    while True:
        # Sites that are connected already are invited too: a restarted coordinator knows no site.
        list(transport.invite(plan.request, max(until - clock(), PAUSE), again=again))
        left = [site for site in transport.sites if site not in answers]
        request = _result(plan, run, final, history, max(wanted, len(transport.sites)))
        for reply in transport.ask(left, Stage.RESULT, request, max(until - clock(), PAUSE)):
            sent += reply.bytes_down
            if reply.failure not in SILENT:
                answers[reply.site] = reply.failure
        if len(answers) >= wanted or clock() + PAUSE > until:
            break
        again = True
        pause(PAUSE)
    silent = dict.fromkeys(set(transport.sites) - set(answers), "silent")
    missing = {site: why for site, why in {**answers, **silent}.items() if why}
    facts = {
        "sites": sorted(site for site, why in answers.items() if not why),
        "missing": [{"site": site, "reason": missing[site]} for site in sorted(missing)],
    }
    run.event("handed-over", bytes_down=sent, **facts)
    return facts


def _result(
    plan: Plan, run: Run, final: Vector, history: list[dict[str, Any]], sites: int
) -> ResultRequest:
    return ResultRequest(
        session=plan.session,
        round=max((line["round"] for line in history), default=1),
        run=run.name,
        job=plan.request.job,
        names=plan.exchanged.names,
        sites=sites,
        rounds=tuple(_past(line, plan.job.task.share.key) for line in history),
        adapter=final,
    )


def _past(line: dict[str, Any], share: str) -> PastRound:
    """Return one round as a site gets it; ``share`` is the key of the task's share."""
    validation = line["validation"] or {}
    return PastRound(
        round=line["round"],
        sites=line["sites"],
        loss=float(line["train_loss"]),
        accuracy=float(validation.get(share, math.nan)),
    )
