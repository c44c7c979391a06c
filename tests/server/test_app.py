"""The coordinator behind Flower's ServerApp: a job and a folder in the run's configuration."""

from pathlib import Path

import numpy as np
from flwr.app import Context, RecordDict
from support.federations import adapter_of, digits_job, run_digits, write_digits

from fedgraft.common.config.jobfile import dump_job
from fedgraft.server.app import app
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare


def test_the_server_app_comes_to_the_adapter_of_the_simulation(tmp_path: Path) -> None:
    options = (*write_digits(tmp_path / "digits", 60, 30), "rounds.count=2")
    truth, _ = run_digits(tmp_path / "truth", *options)
    job = digits_job(*options)
    nodes = make_nodes(job, prepare(job), states=str(tmp_path), device="cpu")
    context = Context(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config={"job": dump_job(job), "run": str(tmp_path / "run")},
    )
    with Workers(0, device="cpu") as workers:
        app(LocalGrid(nodes, workers), context)
    assert np.array_equal(adapter_of(Run(tmp_path / "run")), adapter_of(truth))
