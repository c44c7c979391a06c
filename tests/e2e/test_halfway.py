"""A round that dies half-way goes on from the replies that were added up, to the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from support.federations import digits_job, write_digits
from support.matrix import thinned

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Vector
from fedgraft.common.messages.codec import Stage
from fedgraft.server.app import coordinate
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.runs.checkpoints import load_partial
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare


class Crash(Exception):
    """The coordinator dies."""


def small(folder: Path, *overrides: str) -> Job:
    data = write_digits(folder / "digits", 70, 30)
    return digits_job(*data, "simulation.sites=5", "rounds.count=2", *overrides)


def federate(
    folder: Path, *, together: int, die_after: int | None = None, keep_every: float = 0.0
) -> tuple[Vector, list[int]]:
    """The final adapter and the train replies of each round; dies after so many of round 2."""
    run = Run(folder)
    replies: list[int] = []

    def watch(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.TRAIN:
            if done == 1:
                replies.append(0)
            replies[-1] += 1
            if die_after is not None and len(replies) == 2 and replies[-1] > die_after:
                raise Crash

    nodes = make_nodes(run.job, prepare(run.job), states=str(folder / "sites"), device="cpu")
    with run, Workers(0, device="cpu") as workers:
        transport = Transport(LocalGrid(nodes, workers, together=together), watch=watch)
        final = coordinate(transport, run.job, run, together=together, keep_every=keep_every)
    return final, replies


WHERE = [(1, 3, 2), (2, 3, 3), (2, 4, 1)]


@pytest.mark.parametrize(
    ("rule", "together", "die_after", "asked_again"),
    thinned([(rule, *one) for one in WHERE for rule in ("fedavg", "median")], 3),
)
def test_a_round_goes_on_where_it_was(
    tmp_path: Path, together: int, die_after: int, asked_again: int, rule: str
) -> None:
    job = small(tmp_path, f"aggregation.rule={rule}")
    truth, replies = federate(Run.create(tmp_path / "runs", job).folder, together=together)
    assert replies == [5, 5]
    folder = Run.create(tmp_path / "runs", job).folder
    with pytest.raises(Crash):
        federate(folder, together=together, die_after=die_after)
    final, replies = federate(folder, together=together)
    assert replies == [asked_again]  # only whole groups are kept: their sites stay together
    assert np.array_equal(final, truth)
    history = Run(folder).history()
    assert [line["round"] for line in history] == [1, 2]
    assert [line["sites"] for line in history] == [5, 5]
    assert history[0]["bytes_up"] == history[1]["bytes_up"]


def test_nothing_is_left_of_a_round_that_is_over(tmp_path: Path) -> None:
    folder = Run.create(tmp_path / "runs", small(tmp_path)).folder
    federate(folder, together=1)
    assert not list((folder / "checkpoints").glob("partial*"))


def test_what_is_damaged_or_of_another_round_is_not_taken_up(tmp_path: Path) -> None:
    job = small(tmp_path)
    truth, _ = federate(Run.create(tmp_path / "runs", job).folder, together=1)
    folder = Run.create(tmp_path / "runs", job).folder
    with pytest.raises(Crash):
        federate(folder, together=1, die_after=3)
    (path,) = (folder / "checkpoints").glob("partial*")
    layout = _layout_of(job)
    checkpoints = folder / "checkpoints"
    assert load_partial(checkpoints, layout, 2, 0) is not None
    assert load_partial(checkpoints, layout, 1, 0) is None
    assert load_partial(checkpoints, layout, 2, 1) is None
    assert load_partial(checkpoints, "another", 2, 0) is None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_partial(checkpoints, layout, 2, 0) is None
    final, replies = federate(folder, together=1)
    assert replies == [5] and np.array_equal(final, truth)


def test_it_is_not_written_more_often_than_asked(tmp_path: Path) -> None:
    folder = Run.create(tmp_path / "runs", small(tmp_path)).folder
    with pytest.raises(Crash):
        federate(folder, together=1, die_after=3, keep_every=3600.0)
    assert not list((folder / "checkpoints").glob("partial*"))


def _layout_of(job: Job) -> str:
    from fedgraft.common.adapters.model import open_workbench
    from fedgraft.server.plan import make_plan

    return make_plan(job, open_workbench(job), "").exchanged.fingerprint
