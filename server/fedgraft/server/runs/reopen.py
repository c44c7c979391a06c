"""Open a finished run again, to export its adapter or to use its model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.backbones.blob_store import PLACE, set_store
from fedgraft.common.errors import RunError
from fedgraft.common.layout import Layout, Vector
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run

__all__ = ["Reopened", "reopen"]


@dataclass(frozen=True)
class Reopened:
    """A run with its final ``adapter``, float32 [exchanged.size]."""

    run: Run
    bench: Workbench
    exchanged: Layout
    adapter: Vector

    @contextmanager
    def adapted(self) -> Iterator[Workbench]:
        """Yield the workbench with the adapter in it; restore the workbench at the end."""
        self.bench.put((self.exchanged, self.adapter))
        try:
            yield self.bench
        finally:
            self.bench.put()


def reopen(folder: Path) -> Reopened:
    """Open the run in ``folder`` with its final adapter.

    Raises:
        InputError: ``folder`` is not the folder of a run.
        RunError: the run has no finished round.
        BackboneError: the run's backbone is no longer on this machine.
    """
    opened = Run(folder)
    # The backbone of a coordinator's run is in the coordinator's store, beside the runs.
    store = folder.resolve().parent.parent / "backbones"
    if PLACE not in os.environ and store.is_dir():
        set_store(store)
    bench = open_workbench(opened.job)
    plan = make_plan(opened.job, bench, opened.session)
    state = opened.latest(plan.exchanged)
    if state is None:
        raise RunError(f"{folder} has no finished round", hint="run it first")
    return Reopened(opened, bench, plan.exchanged, state.final)
