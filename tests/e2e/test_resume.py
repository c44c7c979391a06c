"""A run that dies at any moment continues to the very bytes it would have had."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.federations import SMALL, adapter_of, digits_job, run_digits, write_digits
from support.matrix import slow_unless

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Vector
from fedgraft.server.app import coordinate
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.runs import run_folder as runs_module
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.cli import simulate as cli
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare

# Everything that changes the state of the disk on the way through the rounds.
FILE_OPERATIONS = ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (runs_module, "_append"))
# Moments at the server, heads at the sites: all the state a round can have.
OPTIONS = (
    "simulation.sites=2",
    "rounds.count=2",
    "aggregation.server_optimizer={kind='adam', learning_rate=0.01}",
    "method.head=local",
)


@contextmanager
def dying_at(count: int, *, after: bool) -> Iterator[None]:
    """Kill this process right before, or ``after``, its ``count``-th operation on a file."""
    left = count

    def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            due = left == 0  # decided here, for operations may be made of operations
            if due and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args, **kwargs)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for owner, name in FILE_OPERATIONS:
        setattr(owner, name, deadly(getattr(owner, name)))
    yield


def federate(folder: Path) -> Vector:
    run = Run(folder)
    nodes = make_nodes(run.job, prepare(run.job), states=str(folder / "sites"), device="cpu")
    with run, Workers(0, device="cpu") as workers:
        return coordinate(Transport(LocalGrid(nodes, workers)), run.job, run)


def die_or_finish(folder: Path, count: int, after: bool) -> None:
    with dying_at(count, after=after):
        federate(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    data = write_digits(tmp_path_factory.mktemp("digits"), 40, 20)
    return digits_job(*OPTIONS, *data)


@pytest.mark.parametrize(
    ("after", "step"),
    slow_unless([(False, 5), (False, 1), (True, 1)], lambda case: case == (False, 5)),
)
def test_killed_at_a_file_operation_it_resumes_to_the_same_bytes(
    tmp_path: Path, job: Job, after: bool, step: int
) -> None:
    truth = federate(Run.create(tmp_path, job).folder)
    context = multiprocessing.get_context("fork")
    deaths = 0
    for count in range(1, 300, step):
        folder = Run.create(tmp_path, job).folder
        process = context.Process(target=die_or_finish, args=(folder, count, after))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        assert np.array_equal(federate(folder), truth), f"after {count} operations"
        assert [line["round"] for line in Run(folder).history()] == [1, 2]
    else:
        pytest.fail("it never finished")
    assert deaths * step > 10


def test_with_a_damaged_checkpoint_it_goes_back_one_and_comes_to_the_same_bytes(
    tmp_path: Path, job: Job
) -> None:
    longer = job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": 4})})
    truth = federate(Run.create(tmp_path, longer).folder)
    folder = Run.create(tmp_path, longer).folder
    context = multiprocessing.get_context("fork")
    process = context.Process(target=die_in_round, args=(folder, 4))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    newest = max((folder / "checkpoints").glob("round-*"))
    assert newest.name.startswith("round-000003")
    newest.write_bytes(newest.read_bytes()[:-1])
    assert np.array_equal(federate(folder), truth)
    assert [event["event"] for event in Run(folder).events()].count("warning") == 1


def die_in_round(folder: Path, number: int) -> None:
    """Die when the round is over and nothing of it is written: the sites have trained."""

    def deadly(path: Path, line: dict[str, Any]) -> None:
        if line.get("round") == number:
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, line)

    append = runs_module._append
    runs_module._append = deadly
    federate(folder)


@pytest.mark.slow
def test_killed_from_outside_and_resumed_by_the_command(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 200, 50)
    truth, _ = run_digits(tmp_path / "truth", *data, "rounds.count=6")
    sets = [word for override in (*SMALL, *data, "rounds.count=6") for word in ("--set", override)]
    simulate = [sys.executable, "-m", "fedgraft", "simulate", "-q"]
    process = subprocess.Popen(
        [*simulate, str(cli.DEMO), *sets, "--runs", str(tmp_path / "runs")],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/checkpoints/round-00000[1-5].*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "runs").iterdir()
    subprocess.run(
        [*simulate, "--resume", str(folder)], check=True, stdout=subprocess.DEVNULL, timeout=180
    )
    assert np.array_equal(adapter_of(Run(folder)), adapter_of(truth))
    assert [line["round"] for line in Run(folder).history()] == [1, 2, 3, 4, 5, 6]
    assert [event["event"] for event in Run(folder).events()].count("resumed") == 1
