"""A job, its sites and its runs. The first test that needs a run makes it; later tests share it."""

import itertools
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.trainings import felt

from fedgraft.client.model.batched_modules import trained_tensor
from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.results.compare import compare
from fedgraft.client.results.report import write_report
from fedgraft.client.results.store import find_result
from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.console import Console
from fedgraft.common.layout import Layout, Vector
from fedgraft.common.messages.payloads import EvaluateRequest
from fedgraft.common.metrics.metric import Metric
from fedgraft.server.app import coordinate, finish
from fedgraft.server.export.adapter import export_adapter
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.protocol.clear import evaluate_clear
from fedgraft.server.protocol.masked import Masking, evaluate_masked
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.rounds import run_round
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import Evaluated, RoundRecord, State
from fedgraft.simulations.data.partition import PreparedSites
from fedgraft.simulations.grid.engine import Nodes, make_nodes
from fedgraft.simulations.grid.identities import found_federation
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

__all__ = [
    "MASKED",
    "Federation",
    "OneRound",
    "card_model",
    "check_figures",
    "check_resumed",
    "distance",
    "outputs",
    "same",
    "still_modules",
    "unfilled",
]

SESSION = "0123456789abcdef" * 2
STILL = 1e-5  # two rounds move what they move by far more
MASKED = {"secure_aggregation": {"enabled": True, "max_sites": 4, "max_weight": 64}}
"""The section ``[privacy]`` of a masked job."""


@dataclass
class Federation:
    """A job whose sites this machine has, with runs below ``folder``."""

    job: Job
    folder: Path

    @cached_property
    def prepared(self) -> PreparedSites:
        """The folders of the sites."""
        return prepare(self.job)

    @property
    def bench(self) -> Workbench:
        """The job's model, the adapter reset to where it begins."""
        bench = open_workbench(self.job)
        bench.put()
        return bench

    @cached_property
    def exchanged(self) -> Layout:
        """What travels."""
        return make_plan(self.job, self.bench, "").exchanged

    @cached_property
    def simulated(self) -> Run:
        """The run from its sites to the report."""
        prepared = self.prepared
        with Run.create(self.folder / "simulated", self.job) as run:
            simulate(prepared, run, Console(quiet=True))
        return run

    @cached_property
    def adapter(self) -> Vector:
        """What the simulated run ended with, float32 [exchanged.size]."""
        state = self.simulated.latest(self.exchanged)
        assert state is not None
        return state.final

    @cached_property
    def trained(self) -> tuple[Run, Vector]:
        """A run of its rounds alone, its adapter exported, and that adapter."""
        with Run.create(self.folder / "trained", self.job) as run:
            final = coordinate(self.transport(run), self.job, run)
        export_adapter(run, self.bench, self.exchanged, final, run.folder / "adapter")
        return run, final

    @cached_property
    def resumed(self) -> tuple[Run, Vector]:
        """A run that was stopped after its first round and gone on with, and its last adapter."""
        made = Run.create(self.folder / "resumed", self.job)

        def stop(record: RoundRecord) -> None:
            raise KeyboardInterrupt

        with suppress(KeyboardInterrupt), Run(made.folder) as run:
            coordinate(self.transport(run), self.job, run, on_round=stop)
        with Run(made.folder) as run:
            assert [line["round"] for line in run.history()] == [1]
            return run, coordinate(self.transport(run), self.job, run)

    @cached_property
    def handed_over(self) -> Run:
        """The resumed run as one of partners: every site has kept its result."""
        run, final = self.resumed
        finish(run, self.transport(run), final)
        return run

    @cached_property
    def together(self) -> Vector:
        """The last adapter of a run whose sites train in one pass."""
        with Run.create(self.folder / "together", self.job) as run:
            count = len(self.prepared.sites)
            transport = self.transport(run, together=count)
            return coordinate(transport, self.job, run, together=count)

    @cached_property
    def reported(self) -> Path:
        """The result of a site of the run of partners, with the site's own report."""
        site = self.site(self.handed_over)
        result = find_result(site.state, self.handed_over.name)
        write_report(result.folder, compare(site, result))
        return result.folder

    def nodes(self, states: Path) -> Nodes:
        """The sites, which keep below ``states`` what they keep."""
        return make_nodes(self.job, self.prepared, states=str(states), device="cpu")

    def transport(self, run: Run, *, together: int = 1) -> Transport:
        """To the sites of ``run``, which stay in its folder; the clock stands."""
        workers = Workers(0, device="cpu")
        grid = LocalGrid(self.nodes(run.folder / "sites"), workers, together=together)
        return Transport(grid, clock=lambda: 0.0)

    def site(self, run: Run, number: int = 0) -> Participant:
        """A site of ``run``."""
        return open_participant(self.nodes(run.folder / "sites")[number])


class OneRound:
    """A round of a federation, masked or in clear, and what its sites count of any adapter."""

    def __init__(self, job: Job, folder: Path) -> None:
        federation = Federation(job, folder)
        names = [site.name for site in federation.prepared.sites]
        roster = found_federation(job, folder, names)
        masking = Masking(roster, itertools.count(1).__next__) if roster else None
        self.job, self.names = job, names
        self.plan: Plan = make_plan(job, federation.bench, SESSION, masking)
        grid = LocalGrid(federation.nodes(folder), Workers(0, device="cpu"))
        self.transport = Transport(grid, clock=lambda: 0.0)
        self.start = State(0, federation.bench.initial_of(self.plan.exchanged))
        members = roster.ids if roster else None
        refused = [r for r in self.transport.invite(self.plan.request, 60, members=members)]
        assert not [reply.failure for reply in refused if reply.failure]
        self.state, self.record = run_round(self.plan, self.transport, self.start)

    def count(self, adapter: Vector) -> Evaluated:
        """What the sites hold out, evaluated with ``adapter``."""
        plan = self.plan
        request = EvaluateRequest(
            SESSION, 1, plan.request.job, plan.exchanged.names, "validation", adapter
        )
        if plan.masking is not None:
            return evaluate_masked(plan.masking, self.job, self.transport, self.names, request)
        return evaluate_clear(self.job, self.transport, self.names, request, plan.exchanged)


def check_resumed(federation: Federation, whole: Run, adapter: Vector) -> None:
    """Check that the resumed run ended as ``whole``, which ended in ``adapter``, to the byte."""
    run, final = federation.resumed
    assert final.tobytes() == adapter.tobytes()
    ours, theirs = ([{**line, "seconds": 0.0} for line in one.history()] for one in (run, whole))
    assert ours == theirs
    assert [event["event"] for event in run.events()].count("resumed") == 1


def check_figures(metrics: tuple[Metric, Metric], found: dict[str, Any]) -> None:
    """Check what ``Measures.figures`` gave, with intervals beside: numbers, or more of them."""
    assert {metric.key for metric in metrics} | {"loss"} <= found.keys()
    for key, value in found.items():
        ends = value if key.endswith("_interval") else [value]
        assert isinstance(value, dict) or all(math.isfinite(end) for end in ends), key


def card_model(folder: Path, backbone: Path | None = None) -> Any:
    """The model that the code on the card of the adapter in ``folder`` makes, run as it stands."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found, "no code on the card"
    code = found[1].replace("THIS_FOLDER", str(folder))
    if backbone is not None:
        code = code.replace(f"FOLDER_OF/{backbone.name}", str(backbone))
    assert "fedgraft" not in code.replace(str(folder), "").replace(str(backbone), "")
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@torch.inference_mode()
def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that the model gives for ``inputs``, by name."""
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    found = model.eval()(**tensors)
    kept = {key: value.clone() for key, value in found.items() if torch.is_tensor(value)}
    assert kept
    return kept


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], most: float) -> bool:
    """Whether all outputs agree up to ``most``, of values around 1."""
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[key], theirs[key], atol=most, rtol=most) for key in ours)


def unfilled(text: str) -> Sequence[str]:
    """Return unfilled placeholders and missing numbers in a text for people."""
    return re.findall(r"\{\{|\}\}|\{%|%\}|\bNone\b(?! of)|\bnan\b|\binf\b|Undefined", text)


def still_modules(federation: Federation, start: Vector, final: Vector) -> list[str]:
    """The modules of which something travels and nothing moved, the head among them.

    All tensors of a module count together: a factor A stands still until its B has left zero.
    """
    model, layout = federation.bench.model.get_base_model(), federation.exchanged
    moved: dict[str, float] = {}
    mask = felt(layout)
    for name, where in layout.slices.items():
        module = trained_tensor(model, name)[0]
        if mask[where].any():
            change = float(np.abs(final[where] - start[where]).max())
            moved[module] = max(moved.get(module, 0.0), change)
    return [module for module, change in moved.items() if not change > STILL]


def distance(ours: Vector, theirs: Vector) -> float:
    """The largest difference of two adapters."""
    return float(np.abs(ours - theirs).max())
