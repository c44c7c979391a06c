"""Small federations for tests: real code, real digits, seconds."""

from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import load_job
from fedgraft.common.console import Console
from fedgraft.common.layout import Vector
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.cli import simulate as cli
from fedgraft.simulations.demo import digits
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

__all__ = ["SMALL", "adapter_of", "digits_job", "run_digits", "write_digits"]

SMALL = (
    "simulation.sites=3",
    "simulation.partition={kind='iid', min_examples=2}",
    "simulation.workers=0",  # to start some takes longer than so few sites
    "simulation.baselines=[]",
    "simulation.finetune_epochs=0",
    "training.batch_size=128",
    "rounds.count=3",
)


def digits_job(*overrides: str) -> Job:
    """The built-in federation, made small, with ``overrides`` on top."""
    return load_job(cli.DEMO, (*SMALL, *overrides))


def write_digits(folder: Path, train: int, test: int) -> tuple[str, ...]:
    """A few real digits as image folders; the overrides that make a job read them."""
    for split, rows, count in zip(("train", "test"), digits.load(), (train, test), strict=True):
        for number, row in enumerate(rows.select(range(count))):
            path = folder / split / str(row["label"]) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return (f"simulation.train={folder / 'train'}", f"simulation.test={folder / 'test'}")


def run_digits(runs: Path, *overrides: str, engine: str = "local") -> tuple[Run, dict[str, Any]]:
    """Run the small federation below ``runs``: its run and its summary."""
    job = digits_job(*overrides)
    prepared = prepare(job)
    with Run.create(runs, job) as run:
        return run, simulate(prepared, run, Console(quiet=True), engine=engine)


def adapter_of(run: Run) -> Vector:
    """The run's last checkpointed adapter, float32 [exchanged]."""
    from safetensors.numpy import load_file

    newest = max((run.folder / "checkpoints").glob("round-*.safetensors"))
    return np.asarray(load_file(newest)["adapter"])
