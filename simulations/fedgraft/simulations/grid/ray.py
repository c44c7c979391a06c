"""Run a job on Flower's own simulation engine, which is Ray, with several GPUs or machines.

The installed code of coordinator and sites runs; only the grid differs. With Ray, replies arrive in
any order, so sums may differ in the last bits between runs.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedgraft.common.config.job import Job
from fedgraft.common.config.simulation import Actor
from fedgraft.common.errors import InputError, RunError
from fedgraft.common.federation.federation_file import Federation
from fedgraft.common.layout import Vector
from fedgraft.server.app import coordinate
from fedgraft.server.protocol.transport import Transport, Watch
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import RoundRecord
from fedgraft.simulations.grid.local_grid import NodeConfig
from fedgraft.simulations.grid.workers import cores

__all__ = ["coordinate_on_ray", "require_ray"]

JOINING = 60.0  # seconds in which Ray must start its nodes


def coordinate_on_ray(
    job: Job,
    run: Run,
    nodes: Sequence[NodeConfig],
    *,
    federation: Federation | None = None,
    on_round: Callable[[RoundRecord], None],
    watch: Watch,
) -> Vector:
    """Run the job with these nodes as Ray actors; return the final exchanged adapter, float32.

    Raises:
        InputError: Ray is not installed.
        FedgraftError: as in ``coordinate``.
    """
    require_ray()
    from flwr.simulation import run_simulation

    server = ServerApp()
    outcome: list[Vector | BaseException] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            transport = Transport(grid, watch=watch)
            transport.wait_for(len(nodes), JOINING)
            outcome.append(
                coordinate(transport, job, run, federation=federation, on_round=on_round)
            )
        except BaseException as error:  # passed on to the waiting thread
            outcome.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flwr announces that this function will move
        run_simulation(
            server_app=server,
            client_app=_AtNode(nodes),
            num_supernodes=len(nodes),
            backend_config=_backend(job, nodes),
        )
    if not outcome:
        raise RunError("Ray ended before the federation began", hint="look at Ray's own messages")
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def require_ray() -> None:
    """Raise InputError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "the Ray engine is not installed", hint='pip install "fedgraft[simulation]"'
        )


class _AtNode:
    """The installed client app, with the configuration of its simulated node."""

    def __init__(self, nodes: Sequence[NodeConfig]) -> None:
        self.nodes = nodes

    def __call__(self, message: Message, context: Context) -> Message:
        import torch

        from fedgraft.client.app import app

        torch.set_num_threads(1)  # as in the local engine, so that both agree
        context.node_config.update(self.nodes[int(context.node_config["partition-id"])])
        return app(message, context)


def _backend(job: Job, nodes: Sequence[NodeConfig]) -> dict[str, Any]:
    gpu = nodes[0].get("device") == "cuda"
    init: dict[str, Any] = {"include_dashboard": False}
    if "RAY_ADDRESS" not in os.environ:  # a running cluster has its own number
        init["num_cpus"] = cores()
    actor = job.simulation.actor if job.simulation else Actor()
    resources = {"num_cpus": actor.cpus, "num_gpus": actor.gpus if gpu else 0.0}
    return {"client_resources": resources, "init_args": init}
