"""The folder of a sweep: the grid, an ordinary run for each cell, and the table of results.

    sweep.json      axes, seeds and each cell's resolved job      written once
    runs/           a run folder for each cell that was begun
    results.json    rows and cells                                after each cell
    table.md        the same to read                              after each cell
    sweep.png       the plot                                      at the end
    sweep.html      table and plot in one file                    at the end

A cell finds its run again by its job, because each job is in the grid only once. Nothing else is
stored: a cell is finished if its run has a summary; all other cells are started or continued.
"""

import json
import secrets
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.console import Console
from fedgraft.common.errors import FedgraftError, InputError, RunError
from fedgraft.common.files import lock_folder, write_text
from fedgraft.server.runs.run_folder import Run, list_runs
from fedgraft.simulations.preparation import inputs_of, prepare
from fedgraft.simulations.simulate import simulate
from fedgraft.simulations.sweep.grid import Axis, Cell
from fedgraft.simulations.sweep.page import write_page, write_table
from fedgraft.simulations.sweep.results import (
    CellResult,
    Results,
    cell_result,
    gather,
    write_results,
)

__all__ = ["Sweep", "check_cells", "run_sweep"]

ENGINE = "local"
Inputs = Mapping[str, str]


class Sweep:
    """One sweep's folder. Use it as a context manager, which locks the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
            self.job = str(facts["job"])
            self.axes = tuple(Axis(a["key"], tuple(a["values"])) for a in facts["axes"])
            self.inputs: list[Inputs] = [dict(cell["inputs"]) for cell in facts["cells"]]
            self.cells = tuple(_read_cell(number, c) for number, c in enumerate(facts["cells"], 1))
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{folder} is not the folder of a sweep", hint="name a folder below sweeps/"
            ) from None
        self._lock: IO[str] | None = None

    @classmethod
    def create(
        cls, parent: Path, axes: Sequence[Axis], cells: Sequence[Cell], inputs: Sequence[Inputs]
    ) -> Self:
        """Create a new sweep over ``cells`` in a new folder below ``parent``, and return it.

        ``inputs`` identify the data that each cell reads. They must be the same when the sweep is
        resumed.

        Raises:
            InputError: the folder cannot be written.
        """
        now, name = datetime.now(UTC), cells[0].job.job.name
        folder = parent / f"{name}-{now.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        facts = {
            "sweep": folder.name,
            "created": now.isoformat(timespec="seconds"),
            "job": name,
            "axes": [{"key": axis.key, "values": list(axis.values)} for axis in axes],
            "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
            "cells": [
                {
                    "label": cell.label,
                    "settings": cell.settings,
                    "inputs": dict(reads),
                    "job": dump_job(cell.job),
                }
                for cell, reads in zip(cells, inputs, strict=True)
            ],
        }
        try:
            (folder / "runs").mkdir(parents=True)
            # sweep.json comes last, so that a folder with a sweep.json is complete.
            write_text(folder / "sweep.json", json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write a sweep to {folder}: {error.strerror}",
                hint="choose another folder with --sweeps DIR",
            ) from None
        return cls(folder)

    def __enter__(self) -> Self:
        self._lock = lock_folder(self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def runs(self) -> dict[int, Run]:
        """Return the runs that were begun, by the number of their cell."""
        begun = {dump_job(run.job): run for run in list_runs(self.folder / "runs")}
        jobs = {cell.number: dump_job(cell.job) for cell in self.cells}
        return {number: begun[job] for number, job in jobs.items() if job in begun}

    def unfinished(self) -> tuple[Cell, ...]:
        """Return the cells without a result."""
        runs = self.runs()
        return tuple(
            cell
            for cell in self.cells
            if cell.number not in runs or runs[cell.number].summary() is None
        )

    def expect(self, inputs: Mapping[int, Inputs]) -> None:
        """Check that data and backbone are those with which the sweep began.

        Otherwise results on different data would be in one table.

        Raises:
            RunError: a cell's input has changed since the sweep began.
        """
        for number, found in inputs.items():
            began = self.inputs[number - 1]
            changed = [name for name, value in found.items() if began.get(name) != value]
            if changed:
                raise RunError(
                    f"since {self.folder} began, its {' and '.join(changed)} changed",
                    hint="bring back what it began with, or start a new sweep",
                )


def _read_cell(number: int, facts: Mapping[str, Any]) -> Cell:
    job = parse_job(tomllib.loads(facts["job"]), where=f"cell {number}")
    return Cell(number, dict(facts["settings"]), str(facts["label"]), job)


def check_cells(cells: Sequence[Cell], console: Console) -> dict[int, Inputs]:
    """Check every cell; return the inputs that each will read, by its number.

    Raises:
        InputError: a cell is wrong; the text names the cell.
    """
    inputs: dict[int, Inputs] = {}
    with console.steps("checking", len(cells)) as steps:
        for cell in cells:
            try:
                inputs[cell.number] = inputs_of(cell.job, prepare(cell.job, ENGINE), ENGINE)
            except InputError as error:
                raise InputError(f"cell {cell.label}: {error}", hint=error.hint) from error
            steps.done(cell.label)
    return inputs


def run_sweep(sweep: Sweep, console: Console) -> Results:
    """Run every unfinished cell, one after the other, in this process; return the results.

    A cell that fails is recorded as failed, and the next cell begins.
    """
    runs = sweep.runs()
    found = {cell.number: cell_result(cell, runs.get(cell.number)) for cell in sweep.cells}
    todo = [cell for cell in sweep.cells if found[cell.number].status != "finished"]
    results = _written(sweep, found)
    for left, cell in zip(range(len(todo) - 1, -1, -1), todo, strict=True):
        console.note(f"cell {cell.number}/{len(sweep.cells)}  {cell.label}")
        run, failure = runs.get(cell.number), None
        try:
            run = _run_cell(sweep, cell, run, console)
        except FedgraftError as error:
            failure = str(error)
            run = sweep.runs().get(cell.number)
        found[cell.number] = cell_result(cell, run, failure)
        results = _written(sweep, found)
        console.note(_cell_line(found[cell.number], results, len(sweep.cells), left))
    write_page(results)
    return results


def _run_cell(sweep: Sweep, cell: Cell, run: Run | None, console: Console) -> Run:
    """Start or continue one cell's run; return the finished run."""
    prepared = prepare(cell.job, ENGINE)  # again, because caches keep only the last few models
    inputs = inputs_of(cell.job, prepared, ENGINE)
    with run or Run.create(sweep.folder / "runs", cell.job, inputs) as opened:
        opened.expect(inputs)
        simulate(prepared, opened, console, engine=ENGINE)
        return opened


def _written(sweep: Sweep, found: Mapping[int, CellResult]) -> Results:
    """Write and return the results so far, so that they can be read while the sweep runs."""
    metric = sweep.cells[0].job.task.metrics[0]
    results = gather(sweep.folder, sweep.job, sweep.axes, tuple(found.values()), metric)
    write_results(results)
    write_table(results)
    return results


def _cell_line(done: CellResult, results: Results, count: int, left: int) -> str:
    """Return a line with a cell's result and the time left, by the mean of finished cells."""
    metric, cells = results.metric, results.cells
    if done.status == "failed":
        said = f"failed: {done.error}"
    else:
        name = "" if metric.percent else f" {metric.short or metric.name}"
        parts = [f"{kind}{name} {metric.text(value)}"
                 for kind, key in (("valid.", "validation"), ("test", "test"))
                 if (value := done.metrics[key]) is not None]  # fmt: skip
        said = "  ".join(["done", *parts])
    took = [seconds for cell in cells if (seconds := cell.metrics["seconds"]) is not None]
    if left and took:
        said += f"  about {_duration(left * statistics.fmean(took))} left"
    return f"cell {done.cell}/{count}  {said}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
