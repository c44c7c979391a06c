"""A run's folder survives what happens to folders: crashes, torn lines, two owners."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import (
    LAYOUT,
    commit,
    kinds,
    make_job,
    make_record,
    make_state,
)

from fedgraft.common.errors import InputError, RunError
from fedgraft.server.runs.run_folder import Run, list_runs
from fedgraft.server.state import Dropped


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs", make_job())


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
