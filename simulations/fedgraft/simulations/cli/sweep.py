"""``fedgraft sweep``: read a job file and a grid; write a run per cell, a table and a plot."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError
from fedgraft.simulations.cli.simulate import DEMO

__all__ = ["sweep"]


def sweep(
    job: Annotated[
        Path | None, typer.Argument(help="Job file; without one, the built-in federation.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=V1,V2,...", help="Values that a key takes in turn."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many, counting up from the job's own (default 1).")
    ] = None,
    sweeps: Annotated[Path, typer.Option(help="Folder that sweep folders go into.")] = Path(
        "sweeps"
    ),
    resume: Annotated[
        Path | None, typer.Option(help="Continue the sweep in this folder instead of a new one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Simulate a job with each combination of settings and seed; tell the best."""
    console = Console(as_json=as_json, quiet=quiet)
    if resume is not None and (job is not None or overrides or seeds is not None):
        raise InputError(
            "a resumed sweep keeps its job and grid", hint="give --resume alone, or start a new one"
        )
    from fedgraft.simulations.sweep.grid import make_cells, read_axes

    axes = read_axes(overrides or ())
    cells = () if resume else make_cells(job or DEMO, axes, seeds)  # before the slow imports
    console.note("loading torch and transformers ...")
    from fedgraft.simulations.sweep.page import show
    from fedgraft.simulations.sweep.run import Sweep, check_cells, run_sweep

    if resume:
        opened = Sweep(resume)
    else:  # check all cells before the folder is made: bad input must leave no folder
        inputs = check_cells(cells, console)
        opened = Sweep.create(sweeps, axes, cells, [inputs[cell.number] for cell in cells])
    with opened:
        if resume:
            opened.expect(check_cells(opened.unfinished(), console))
        try:
            results = run_sweep(opened, console)
        except BaseException:
            console.note(f"continue with: fedgraft sweep --resume {opened.folder}")
            raise
    console.json(results.to_json())
    show(console, results)
    return 1 if results.failed else 0
