"""Run a whole federation on this machine: run the coordinator, compare, report.

All steps can be resumed. Sites are found again by their hash. Rounds continue from the run's last
checkpoint. A finished comparison is read from its file; an unfinished one starts again.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from fedgraft.common.adapters.model import choose_device, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.simulation import Simulation as SimulationSettings
from fedgraft.common.console import Console, Steps
from fedgraft.common.layout import Vector
from fedgraft.common.messages.codec import Stage
from fedgraft.common.metrics.metric import Metric
from fedgraft.server.app import coordinate
from fedgraft.server.export.adapter import export_adapter
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.protocol.masked import Masking
from fedgraft.server.protocol.transport import Transport, Watch
from fedgraft.server.report.page import write_report
from fedgraft.server.rounds import run_job
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.runs.summary import run_facts
from fedgraft.server.runs.weight_changes import moved_modules
from fedgraft.server.state import RoundRecord, State
from fedgraft.simulations.baselines.compare import Measured, Trial, head_only_job, start
from fedgraft.simulations.baselines.results import (
    final_metrics,
    load_measured,
    save_measured,
    site_results,
)
from fedgraft.simulations.baselines.site_map import map_sites
from fedgraft.simulations.data.partition import PreparedSites, SimulatedSite
from fedgraft.simulations.faults.grid import FaultyGrid, Waited
from fedgraft.simulations.faults.plan import Fates, Step
from fedgraft.simulations.grid.engine import Nodes, choose_sites_per_pass, make_nodes
from fedgraft.simulations.grid.identities import found_federation
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.memory import Pace, PeakMemory
from fedgraft.simulations.grid.ray import coordinate_on_ray
from fedgraft.simulations.grid.workers import Workers

__all__ = ["simulate"]

KEEP_EVERY = 10.0  # seconds between two saves of an unfinished round


def simulate(
    prepared: PreparedSites, run: Run, console: Console, *, engine: str = "local"
) -> dict[str, Any]:
    """Run the job of ``run`` in its folder; return the summary, which is also written there.

    ``engine`` is ``local`` (this process and forked workers) or ``ray`` (Flower's simulation
    engine).

    Raises:
        FedgraftError: any error of ``errors.py``; the run can be resumed afterwards.
    """
    started = time.monotonic()
    job, sites, settings = run.job, prepared.sites, prepared.settings
    device = str(choose_device(settings.device))
    with PeakMemory() as memory, Workers(settings.workers, device=device) as workers:
        run.event("started", engine=engine, device=device)
        bench = open_workbench(job)
        names = [site.name for site in sites]
        federation = found_federation(job, run.folder / "sites", names)
        masking = Masking(federation, run.next_masked_round) if federation else None
        plan = make_plan(job, bench, run.session, masking)
        fates = Fates.draw(job, names)
        nodes = make_nodes(job, prepared, states=str(run.folder / "sites"), device=device)
        together = choose_sites_per_pass(job, nodes)
        simulation = _Simulation(run, prepared, nodes, workers, masking, fates, together, memory)
        simulation.announce(console, plan)
        behind = run.latest(plan.exchanged)
        done = behind.round if behind else 0
        earlier = sum(line["seconds"] for line in run.history()[:done])
        adapter = simulation.federate(console, engine, done)
        # Export now, so that an error in a comparison cannot lose the result.
        export_adapter(run, bench, plan.exchanged, adapter, run.folder / "adapter")
        trial = simulation.trial(plan, adapter, len(run.history()))
        measured = simulation.compare(trial, console)
    summary = {
        **run_facts(run, bench, plan),
        "engine": engine,
        "device": device,
        "sites_per_pass": together if engine == "local" else 1,
        "seconds": round(earlier + time.monotonic() - started, 3),
        "peak_memory_mb": round(memory.megabytes, 1),
        **simulation.results(measured),
        "moved": [one.to_json() for one in moved_modules(bench, (plan.exchanged, adapter))],
    }
    run.finish(summary)
    export_adapter(run, bench, plan.exchanged, adapter, run.folder / "adapter")
    write_report(run.folder, summary, run.history())
    return summary


@dataclass(frozen=True)
class _Simulation:
    """The parts of one simulation that do not change."""

    run: Run
    prepared: PreparedSites
    nodes: Nodes
    workers: Workers
    masking: Masking | None
    fates: Fates
    together: int
    memory: PeakMemory

    @property
    def job(self) -> Job:
        """Return the job of the run."""
        return self.run.job

    @property
    def settings(self) -> SimulationSettings:
        """Return the job's settings of the simulation."""
        return self.prepared.settings

    def announce(self, console: Console, plan: Plan) -> None:
        """Say what is simulated, and record what is left out and what goes wrong on purpose."""
        console.note(_headline(self.job, self.prepared.sites, plan))
        if skipped := self.prepared.skipped:
            self.run.event("skipped-files", count=skipped)
        for note in self.prepared.notes:
            console.note(note)
        if self.settings.faults.any:
            self.run.event("faults", **self.fates.facts())
            console.note(self.fates.describe())

    def results(self, measured: dict[str, Measured | None]) -> dict[str, Any]:
        """Return the part of the summary that only a simulation has."""
        job, sites = self.job, self.prepared.sites
        names, states = [one.name for one in sites], [Path(one["state"]) for one in self.nodes]
        return {
            "skipped_files": self.prepared.skipped,
            "data_notes": list(self.prepared.notes),
            "faults": self.fates.summary(self.run.events()) if self.settings.faults.any else None,
            "final": final_metrics(measured, job.job.seed, job.measures, job.task),
            "site_map": map_sites(job, states, names),
            "sites": site_results(sites, measured, job.job.seed, job.measures, job.task),
        }

    def federate(self, console: Console, engine: str, done: int) -> Vector:
        """Run the federation after ``done`` rounds; return the final exchanged adapter."""
        with console.steps("round", self.job.rounds.count, done) as steps:
            pace = Pace(self.memory, self.job.rounds.count - done)
            shown = _Shown(steps, pace, self.job.task.metrics[0])
            federation = self.masking.federation if self.masking else None
            if engine == "ray":
                return coordinate_on_ray(
                    self.job,
                    self.run,
                    self.nodes,
                    federation=federation,
                    on_round=shown.on_round,
                    watch=shown.watch,
                )
            return coordinate(
                self.transport(shown.watch, self.waited),
                self.job,
                self.run,
                federation=federation,
                on_round=shown.on_round,
                together=self.together,
                # With faults, replies come in another order than the sites were trained in.
                keep_every=inf if self.settings.faults.any else KEEP_EVERY,
            )

    def transport(
        self, watch: Watch, waited: Waited = lambda step, stage, seconds: None
    ) -> Transport:
        """Return the transport to the sites in this process.

        Its clock stands still, because a site that waits for a core is not late. Only faults move
        the clock; ``waited`` is called with the seconds.
        """
        grid = LocalGrid(self.nodes, self.workers, together=self.together)
        if not self.settings.faults.any:
            return Transport(grid, clock=lambda: 0.0, pause=_at_once, watch=watch)
        faulty = FaultyGrid(grid, self.fates, waited)
        return Transport(faulty, clock=faulty.clock, pause=_at_once, watch=watch)

    def waited(self, step: Step, stage: Stage, seconds: float) -> None:
        """Record the seconds that the coordinator would have waited for the replies of a stage."""
        self.run.event(
            "waited", **asdict(step), stage=stage.name.lower(), seconds=round(seconds, 3)
        )

    def trial(self, plan: Plan, adapter: Vector, number: int) -> Trial:
        """Return ``adapter`` after round ``number`` as a trial for comparisons."""
        names = plan.exchanged.names
        return Trial(plan.job, self.nodes, plan.session, names, adapter, number, self.together)

    def compare(self, trial: Trial, console: Console) -> dict[str, Measured | None]:
        """Return every comparison of the job; those that an earlier process finished are read."""
        folder = self.run.folder / "comparison"
        folder.mkdir(exist_ok=True)
        wanted = ["federated", *self.settings.baselines]
        if self.settings.finetune_epochs:
            wanted.append("federated_tuned")
        wanted.sort(key=lambda name: name != "central")  # central is one long task: start it first
        todo = [name for name in wanted if not (folder / f"{name}.json").exists()]
        headed = self._head_only(console) if "head_only" in todo else None
        trials = {name: headed if name == "head_only" else trial for name in todo}
        # All start together, so that the long task, central, overlaps with the many short tasks.
        started = {
            name: start("federated" if name == "head_only" else name, chosen, self.workers)
            for name, chosen in trials.items()
            if chosen is not None
        }
        with console.steps("comparing", len(todo)) as steps:
            for name in todo:
                running = started.get(name)
                tasks = running.tasks if running else []
                for number, task in enumerate(tasks, 1):
                    task.result()
                    steps.within(number / len(tasks), f"{name} {number}/{len(tasks)}")
                steps.done(name)
                save_measured(folder / f"{name}.json", running.result() if running else None)
        return {name: load_measured(folder / f"{name}.json", self.job.measures) for name in wanted}

    def _head_only(self, console: Console) -> Trial | None:
        """Run the same federation with only the head trained; return its trial.

        It is None if the job itself trains only the head, or if its task has no head to train
        alone.
        """
        job = head_only_job(self.job)
        if job.method == self.job.method or not job.task.head_alone:
            return None
        bench = open_workbench(job)
        plan = make_plan(job, bench, self.run.session, self.masking)
        state = State(0, bench.initial_of(plan.exchanged))
        with console.steps("head only", job.rounds.count) as steps:
            shown = _Shown(steps, Pace(self.memory, job.rounds.count), job.task.metrics[0])
            state = run_job(
                plan,
                self.transport(shown.watch),
                state,
                commit=lambda state, record: shown.on_round(record),
                warn=self.run.warn,
            )
        return self.trial(plan, state.final, state.round)


@dataclass(frozen=True)
class _Shown:
    """The progress on the console."""

    steps: Steps
    pace: Pace
    metric: Metric

    def watch(self, stage: Stage, done: int, total: int) -> None:
        """Show that a site has answered."""
        if stage is Stage.TRAIN:
            self.steps.within(done / total, self.pace.within(done))

    def on_round(self, record: RoundRecord) -> None:
        """Show that a round is over."""
        line = _round_line(record, self.metric)
        self.steps.done(f"{line}  {self.pace.after(record.sites, record.seconds)}")


def _at_once(seconds: float) -> None:
    """Pull again without a pause: a local grid waits for a reply while it is pulled."""


def _headline(job: Job, sites: Sequence[SimulatedSite], plan: Plan) -> str:
    examples = sum(site.examples for site in sites)
    return (
        f"{job.job.name}: {len(sites)} sites, {examples:,} training examples, "
        f"{plan.exchanged.size:,} parameters travel"
    )


def _round_line(record: RoundRecord, metric: Metric) -> str:
    parts = [f"loss {record.train_loss:.3f}"]
    if record.validation is not None:
        parts.append(f"valid. {metric.text(record.validation[metric.key])}")
    if record.dropped:
        some = ", ".join(f"{d.site} ({d.reason})" for d in record.dropped[:3])
        more = f" and {len(record.dropped) - 3} more" if len(record.dropped) > 3 else ""
        parts.append(f"dropped {some}{more}")
    return "  ".join(parts)
