"""A run's folder survives what happens to folders: crashes, torn lines, flipped bits."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import CheckpointError, InputError, RunError
from fedgraft.common.layout import Layout
from fedgraft.server.runs.run_folder import Run, list_runs
from fedgraft.server.state import Dropped, RoundRecord, State

LAYOUT = Layout(("base.q.lora_A.default.weight", "base.q.lora_B.default.weight"), ((2, 3), (4, 2)))


def make_job(**rounds: Any) -> Job:
    raw = {
        "job": {"name": "wards", "task": "text-classification", "labels": ["no", "yes"], "seed": 5},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "lora", "head": "shared"},
        "rounds": rounds,
        "simulation": {"train": "/data/train.jsonl", "sites": 4},
    }
    return parse_job(raw, where="test")


def make_state(number: int, **changes: Any) -> State:
    draw = np.random.default_rng(number)
    state = State(
        round=number,
        adapter=draw.normal(size=LAYOUT.size).astype(np.float32),
        moments={"m": draw.normal(size=LAYOUT.size), "v": draw.random(LAYOUT.size) * 1e-9},
        best=draw.normal(size=LAYOUT.size).astype(np.float32),
        best_score=-0.1 - number / 3,
        stale=number % 2,
    )
    return replace(state, **changes)


def make_record(number: int, dropped: tuple[Dropped, ...] = ()) -> RoundRecord:
    return RoundRecord(number, 3, 3, dropped, 30, 1 / number, 0.5, {"loss": 0.25}, 1000, 2000, 1.5)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs", make_job())


def commit(run: Run, *numbers: int) -> None:
    for number in numbers:
        run.commit(make_state(number), make_record(number), LAYOUT)


def checkpoints(run: Run) -> list[Path]:
    return sorted((run.folder / "checkpoints").iterdir())


def same(state: State | None, wanted: State) -> bool:
    assert state is not None
    assert state.adapter.dtype == np.float32
    return (
        (state.round, state.best_score, state.stale)
        == (wanted.round, wanted.best_score, wanted.stale)
        and state.adapter.tobytes() == wanted.adapter.tobytes()
        and (state.best is None) == (wanted.best is None)
        and (wanted.best is None or np.array_equal(state.best, wanted.best))  # type: ignore[arg-type]
        and state.moments.keys() == wanted.moments.keys()
        and all(
            state.moments[name].tobytes() == value.tobytes()
            and state.moments[name].dtype == value.dtype
            for name, value in wanted.moments.items()
        )
    )


def kinds(run: Run) -> list[str]:
    return [event["event"] for event in run.events()]


# The folder


def test_a_new_run_holds_its_job_and_what_it_runs_on(run: Run, tmp_path: Path) -> None:
    assert run.folder.parent == tmp_path / "runs"
    assert run.name == run.folder.name
    assert run.name.startswith("wards-")
    assert {path.name for path in run.folder.iterdir()} == {
        "run.json",
        "job.toml",
        "environment.json",
        "checkpoints",
    }
    assert len(run.session) == 32 and int(run.session, 16) >= 0
    assert run.environment()["torch"]
    assert run.summary() is None
    assert run.history() == [] and run.events() == []


def test_a_run_opened_again_is_the_same_run(run: Run) -> None:
    again = Run(run.folder)
    assert again.job == run.job == make_job()
    assert (again.session, again.created, again.name) == (run.session, run.created, run.name)


def test_every_run_has_its_own_session_and_folder(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path, make_job()) for _ in range(5)]
    assert len({run.session for run in runs}) == len({run.folder for run in runs}) == 5


def test_open_or_create_makes_a_run_once(tmp_path: Path) -> None:
    first = Run.open_or_create(tmp_path / "mine", make_job(count=3))
    again = Run.open_or_create(tmp_path / "mine", make_job(count=9))
    assert again.session == first.session
    assert again.job.rounds.count == 3  # the run's own job, not the one that was given now


def test_a_folder_that_could_not_be_completed_is_no_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path, make_job())
    (run.folder / "run.json").unlink()  # written last
    assert list_runs(tmp_path) == []
    again = Run.open_or_create(run.folder, make_job())
    assert again.folder == run.folder


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"session": "x"}', "\xff"])
def test_a_folder_that_is_no_run_is_refused_as_such(tmp_path: Path, content: str | None) -> None:
    run = Run.create(tmp_path, make_job())
    path = run.folder / "run.json"
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="is not the folder of a run") as caught:
        Run(run.folder)
    assert caught.value.exit_code == 2
    assert "fedgraft runs" in caught.value.hint


def test_a_run_whose_job_is_broken_is_refused(run: Run) -> None:
    (run.folder / "job.toml").write_text("[job\n")
    with pytest.raises(InputError):
        Run(run.folder)


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot write a run") as caught:
        Run.create(tmp_path / "file" / "runs", make_job())
    assert caught.value.exit_code == 2
    assert "--runs" in caught.value.hint


def test_runs_are_listed_oldest_first_and_other_folders_passed_over(tmp_path: Path) -> None:
    runs = [Run.open_or_create(tmp_path / name, make_job()) for name in ("c", "a", "b")]
    for day, run in enumerate(runs, 1):
        facts = json.loads((run.folder / "run.json").read_text())
        facts["created"] = f"2026-01-0{day}T00:00:00+00:00"
        (run.folder / "run.json").write_text(json.dumps(facts))
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("x")
    assert [run.name for run in list_runs(tmp_path)] == ["c", "a", "b"]
    assert list_runs(tmp_path / "nowhere") == []


def test_one_broken_run_does_not_hide_the_others(tmp_path: Path) -> None:
    good, bad = (Run.open_or_create(tmp_path / name, make_job()) for name in ("good", "bad"))
    (bad.folder / "run.json").write_text("{")
    assert [run.name for run in list_runs(tmp_path)] == [good.name]


def test_a_finished_run_has_its_summary(run: Run) -> None:
    run.finish({"final": {"accuracy": 0.9}})
    assert Run(run.folder).summary() == {"final": {"accuracy": 0.9}}
    assert kinds(run) == ["finished"]


# Checkpoints


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


def test_a_commit_is_told(run: Run) -> None:
    run.commit(make_state(1), make_record(1, (Dropped("bob", "deadline"),)), LAYOUT)
    (line,) = run.history()
    assert (line["round"], line["validation"], line["bytes_up"]) == (1, {"loss": 0.25}, 1000)
    assert line["dropped"] == [{"site": "bob", "reason": "deadline"}]
    drop, done = run.events()
    assert (drop["event"], drop["round"], drop["site"], drop["reason"]) == (
        "dropped",
        1,
        "bob",
        "deadline",
    )
    assert (done["event"], done["round"], done["sites"]) == ("round", 1, 3)
    assert done["time"].endswith("+00:00")


def test_a_warning_names_the_sites(run: Run) -> None:
    run.warn("refused to take part", [Dropped("node 3", "backbone-differs")])
    (event,) = run.events()
    assert event["event"] == "warning" and event["what"] == "refused to take part"
    assert event["sites"] == [{"site": "node 3", "reason": "backbone-differs"}]


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


# Lines


def test_metrics_after_the_checkpoint_are_cut_off(run: Run) -> None:
    commit(run, 1, 2)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make_record(3).to_json()) + "\n")
    before = run.history()
    assert run.resume(LAYOUT) is not None
    assert run.history() == before[:2]


def test_metrics_before_any_checkpoint_are_cut_off(run: Run) -> None:
    (run.folder / "metrics.jsonl").write_text(json.dumps(make_record(1).to_json()) + "\n")
    assert run.resume(LAYOUT) is None
    assert run.history() == []


def test_resuming_is_told(run: Run) -> None:
    commit(run, 1)
    run.resume(LAYOUT)
    assert run.events()[-1]["event"] == "resumed" and run.events()[-1]["round"] == 1


@pytest.mark.parametrize("torn", ['{"round": 3, "sites"', '{"round": 3}', '{"site": "J\xc3'])
def test_a_torn_last_line_of_metrics_is_survived(run: Run, torn: str) -> None:
    commit(run, 1, 2)
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode("latin-1"))
    run.resume(LAYOUT)
    assert [line["round"] for line in run.history()] == [1, 2]
    commit(run, 3)
    assert [line["round"] for line in run.history()] == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"time": "2026', '{"event": "whole"}', '{"site": "J\xc3'])
def test_events_after_a_torn_line_stay_readable(run: Run, torn: str) -> None:
    run.event("first")
    with (run.folder / "events.jsonl").open("ab") as file:
        file.write(torn.encode("latin-1"))
    run.event("second")
    run.event("third")
    told = kinds(run)
    assert told[0] == "first"
    assert told[-2:] == ["second", "third"]


# One owner


FORK = multiprocessing.get_context("fork")


def _try_to_own(folder: Path) -> None:
    try:
        with Run(folder):
            os._exit(0)
    except RunError as error:
        os._exit(3 if "in use by another process" in str(error) else 1)


def _own_with_a_worker(folder: Path, told: Any) -> None:
    with Run(folder):
        worker = FORK.Process(target=time.sleep, args=(60,))
        worker.start()
        told.put(worker.pid)
        time.sleep(60)


def test_a_run_has_one_owner_at_a_time(run: Run) -> None:
    def another() -> int | None:
        process = FORK.Process(target=_try_to_own, args=(run.folder,))
        process.start()
        process.join(30)
        return process.exitcode

    with Run(run.folder):
        assert another() == 3
        assert len(list_runs(run.folder.parent)) == 1  # looking is allowed
    assert another() == 0


def test_workers_that_outlive_a_killed_owner_do_not_keep_the_lock(run: Run) -> None:
    told = FORK.Queue()
    owner = FORK.Process(target=_own_with_a_worker, args=(run.folder, told))
    owner.start()
    worker = told.get(timeout=30)
    try:
        owner.kill()
        owner.join()  # with a timeout it would wait for what the worker inherited
        with Run(run.folder):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_lock_is_given_back_after_an_error(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    with Run(run.folder):
        pass
