"""Checkpoints of a run come back bit by bit, and one that is damaged is never trusted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.run_folders import (
    LAYOUT,
    checkpoints,
    commit,
    kinds,
    make_job,
    make_record,
    make_state,
    same,
)

from fedgraft.common.errors import CheckpointError
from fedgraft.common.layout import Layout
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import State


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs", make_job())


@pytest.mark.parametrize(
    "state",
    [
        make_state(7),
        make_state(7, moments={}, best=None, best_score=None, stale=0),
        make_state(7, moments={"m": np.full(LAYOUT.size, 5e-324)}),
        make_state(7, adapter=np.full(LAYOUT.size, np.float32(1e-45))),
    ],
    ids=["all", "plain", "denormal moments", "denormal adapter"],
)
def test_a_state_comes_back_bit_by_bit(run: Run, state: State) -> None:
    run.commit(state, make_record(7), LAYOUT)
    assert same(Run(run.folder).resume(LAYOUT), state)
    assert same(Run(run.folder).latest(LAYOUT), state)


def test_a_run_without_a_round_has_no_state(run: Run) -> None:
    assert run.resume(LAYOUT) is None
    assert run.latest(LAYOUT) is None
    assert kinds(run) == []


def test_the_newest_two_checkpoints_are_kept(run: Run) -> None:
    commit(run, *range(1, 13))
    names = [path.name for path in checkpoints(run)]
    assert [name.split(".")[0] for name in names] == ["round-000011", "round-000012"]
    assert same(run.resume(LAYOUT), make_state(12))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(at: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return flip


@pytest.mark.parametrize(
    "damage",
    [_truncate, _empty, _flip(-1), _flip(0), _flip(40), _flip(-100)],
    ids=["truncated", "empty", "last bit", "first bit", "header", "tensor"],
)
def test_a_damaged_checkpoint_is_passed_over(run: Run, damage: Callable[[Path], None]) -> None:
    commit(run, 1, 2, 3)
    damaged = checkpoints(run)[-1]
    damage(damaged)
    assert same(run.resume(LAYOUT), make_state(2))
    told = [event for event in run.events() if event["event"] == "warning"]
    assert len(told) == 1 and damaged.name in told[0]["what"]
    assert [line["round"] for line in run.history()] == [1, 2]
    # The round that was lost is done again, and is then the newest.
    commit(run, 3)
    assert same(Run(run.folder).resume(LAYOUT), make_state(3))


def test_a_checkpoint_under_another_ones_name_is_not_trusted(run: Run) -> None:
    commit(run, 1, 2)
    old, new = checkpoints(run)
    new.write_bytes(old.read_bytes())
    assert same(run.resume(LAYOUT), make_state(1))


def test_no_intact_checkpoint_is_an_error_and_not_a_fresh_start(run: Run) -> None:
    commit(run, 1, 2)
    for path in checkpoints(run):
        _truncate(path)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        run.resume(LAYOUT)
    assert "backup" in caught.value.hint
    assert len(run.history()) == 2  # nothing is thrown away


def test_checkpoints_of_another_adapter_are_not_taken(run: Run) -> None:
    commit(run, 1)
    other = Layout(LAYOUT.names, ((3, 2), (2, 4)))  # of the same size
    with pytest.raises(CheckpointError):
        run.resume(other)


def test_what_a_crash_left_half_written_does_not_matter(run: Run) -> None:
    commit(run, 1, 2)
    folder = run.folder / "checkpoints"
    (folder / "draft.safetensors").write_bytes(b"half")
    (folder / ".draft.safetensors.123.tmp").write_bytes(b"half")
    (folder / "round-000003.safetensors").write_bytes(b"half")
    assert same(run.resume(LAYOUT), make_state(2))
    commit(run, 3)
    assert same(Run(run.folder).resume(LAYOUT), make_state(3))


def test_a_commit_that_fails_half_way_leaves_the_round_before(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run, 1)

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("fedgraft.server.runs.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space"):
        commit(run, 2)
    monkeypatch.undo()
    again = Run(run.folder)
    assert [line["round"] for line in again.history()] == [1, 2]
    assert same(again.resume(LAYOUT), make_state(1))
    assert [line["round"] for line in again.history()] == [1]
    commit(again, 2)
    assert [line["round"] for line in again.history()] == [1, 2]
