"""What the version before the wings wrote, copied to where a test may write."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedgraft.common.federation.federation_file import Federation
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.grid.identities import found_federation
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare

__all__ = ["BEFORE", "copy_of", "copy_run", "open_sites", "recorded"]

BEFORE = Path(__file__).parents[1] / "vectors" / "before_wings"
SECRET = ("*.key", "identity.pem", "secret")  # git does not keep that nobody else may read them


def recorded(name: str) -> Any:
    """The JSON file ``name``."""
    return json.loads((BEFORE / name).read_text(encoding="utf-8"))


def copy_of(name: str, parent: Path) -> Path:
    """A copy of the folder ``name`` below ``parent``, its private keys for this user alone."""
    folder = Path(shutil.copytree(BEFORE / name, parent / name))
    for pattern in SECRET:
        for path in folder.rglob(pattern):
            path.chmod(0o600)
    return folder


def copy_run(name: str, parent: Path) -> Path:
    """A copy of a run folder, called again what it was called."""
    folder = copy_of(name, parent)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return folder.rename(parent / str(facts["run"]))


@contextmanager
def open_sites(run: Run) -> Iterator[tuple[Transport, Federation | None]]:
    """The sites of a simulation's run, asked in this process, and their federation if it has one.

    They keep what they keep in ``sites`` in the folder of the run.
    """
    job, states = run.job, run.folder / "sites"
    prepared = prepare(job)
    federation = found_federation(job, states, [site.name for site in prepared.sites])
    nodes = make_nodes(job, prepared, states=str(states), device="cpu")
    with Workers(0, device="cpu") as workers:
        yield Transport(LocalGrid(nodes, workers), clock=lambda: 0.0), federation
