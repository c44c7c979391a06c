"""The coordinator: it takes a job and a Flower grid, and writes a run folder.

``coordinate`` does all of it. ``app`` does the same as Flower's ``ServerApp``; it reads the job and
the path of the run folder from the run's configuration.
"""

import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgraft.common.adapters.initial import starting_point
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError, CheckpointError, InputError, TooFewSites
from fedgraft.common.federation.federation_file import Federation, load_federation
from fedgraft.common.layout import Vector
from fedgraft.server.coordinator.superlink import save_requests
from fedgraft.server.delivery import hand_over
from fedgraft.server.export.adapter import export_adapter
from fedgraft.server.plan import make_plan
from fedgraft.server.protocol.clear import Halfway
from fedgraft.server.protocol.masked import Masking
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.report.page import write_report
from fedgraft.server.rounds import run_job
from fedgraft.server.runs.run_folder import WAITING, Run
from fedgraft.server.runs.summary import partner_facts, run_facts
from fedgraft.server.state import RoundRecord, State

__all__ = ["app", "coordinate", "finish"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job in ``run_config["job"]`` (TOML) and write to the folder ``run_config["run"]``.

    ``run_config["federation"]`` is the path of the federation file, for secure aggregation. With
    ``run_config["sealed"]``, a reply counts only if a site of that file signed it, as our agent
    does.
    """
    job = parse_job(tomllib.loads(str(context.run_config["job"])), where="job")
    path = str(context.run_config.get("federation") or "")
    federation = load_federation(Path(path)) if path else None
    sealed = bool(context.run_config.get("sealed"))
    save_requests(grid, to_agents=sealed)
    if sealed:
        Thread(target=_end_with_executor, daemon=True).start()
    with Run.open_or_create(Path(str(context.run_config["run"])), job) as run:
        if sealed and federation is None:
            raise InputError("sealed replies need the sites' public keys", hint="name federation")
        transport = Transport(grid, key_of=federation.key_of if federation and sealed else None)
        transport.wait_for(job.rounds.min_sites, job.rounds.deadline)
        try:
            final = coordinate(transport, job, run, federation=federation)
        except (TooFewSites, CheckpointError, BackboneError) as error:  # it is run again later
            run.event(WAITING, what=f"{error}; {error.hint}")
            return
        finish(run, transport, final)


def _end_with_executor() -> None:
    """End this process after the executor that started it has ended.

    A coordinator that is killed cannot end this process. The process would stay without its
    SuperLink, and would keep the run from the coordinator that is started next. A process that has
    lost its parent is a child of process 1.
    """
    parent = os.getppid()
    while os.getppid() == parent and (parent != 1 or os.getpgrp() == 1):
        time.sleep(0.5)
    os._exit(1)


def finish(run: Run, transport: Transport, final: Vector) -> None:
    """Export the final adapter, hand it over to every partner site, and write the report.

    The run is finished only after that: a coordinator that restarts earlier hands it over again.
    """
    bench = open_workbench(run.job)
    plan = make_plan(run.job, bench, run.session)
    export_adapter(run, bench, plan.exchanged, final, run.folder / "adapter")
    handed = hand_over(plan, transport, run, final)
    summary = run_facts(run, bench, plan) | partner_facts(run, handed)
    write_report(run.folder, summary, run.history())
    run.finish(summary)


def coordinate(
    transport: Transport,
    job: Job,
    run: Run,
    *,
    federation: Federation | None = None,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
    together: int = 1,
    keep_every: float = 10.0,
) -> Vector:
    """Run the job from the run's last checkpoint; return the final exchanged adapter, float32.

    ``federation`` holds the sites' public keys; secure aggregation needs it. ``on_round`` is
    called after each round is durable. An unfinished round is made durable every ``keep_every``
    seconds, after a multiple of ``together`` replies.

    Raises:
        InputError: the job asks for secure aggregation and there is no ``federation``.
        TooFewSites: there are not enough sites.
        CheckpointError: the run has checkpoints and none of them can be trusted.
    """
    bench = open_workbench(job)
    masking = Masking(federation, run.next_masked_round) if federation else None
    plan = make_plan(job, bench, run.session, masking)
    halfway = Halfway(
        load=lambda number, attempt: run.load_partial(number, attempt, plan.exchanged),
        save=lambda partial: run.save_partial(partial, plan.exchanged),
        every=together,
        seconds=keep_every,
    )
    state = run.resume(plan.exchanged) or State(0, starting_point(job, bench, plan.exchanged))

    def commit(state: State, record: RoundRecord) -> None:
        run.commit(state, record, plan.exchanged)
        on_round(record)

    plan = replace(plan, halfway=halfway)
    return run_job(plan, transport, state, commit=commit, warn=run.warn).final
