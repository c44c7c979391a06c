"""Submitted jobs: durable, in order, and none keeps the others from their turn."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.coordinators import make_job

from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import InputError
from fedgraft.server.jobs.queue import OPEN, Jobs, Submitted

STATES = ("waiting", "running", "finished", "failed", "stopped")


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs")


def test_a_job_is_durable_and_as_it_was_given(jobs: Jobs, tmp_path: Path) -> None:
    assert jobs.submit("20270101-000000-t-ab12", make_job()) == Submitted("20270101-000000-t-ab12")
    again = Jobs(tmp_path / "jobs")
    assert again.all() == [Submitted("20270101-000000-t-ab12", "waiting", "", 0)]
    import tomllib

    text = again.text("20270101-000000-t-ab12")
    assert parse_job(tomllib.loads(text), where="test") == make_job()
    assert (tmp_path / "jobs").stat().st_mode & 0o077 == 0


def test_starts_are_counted_and_nothing_else_is(jobs: Jobs) -> None:
    jobs.submit("a", make_job())
    assert jobs.set("a", "running").tries == 1
    assert jobs.set("a", "running", "again") == Submitted("a", "running", "again", 2)
    assert jobs.set("a", "finished") == Submitted("a", "finished", "", 2)


def test_a_job_that_is_none_is_named(jobs: Jobs) -> None:
    with pytest.raises(InputError, match="no run z") as error:
        jobs.set("z", "stopped")
    assert "status" in error.value.hint


def test_a_state_is_written_whole_or_not_at_all(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.submit("a", make_job())

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match="no space"):
            jobs.set("a", "running")
    assert jobs.all() == [Submitted("a")]


@given(states=st.lists(st.sampled_from(STATES), max_size=6))
def test_the_oldest_that_is_open_comes_first(
    tmp_path_factory: pytest.TempPathFactory, states: list[str]
) -> None:
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    for number, state in enumerate(states):
        jobs.put(Submitted(f"job-{number}", state))
    at_work = [f"job-{number}" for number, state in enumerate(states) if state in OPEN]
    first = jobs.next()
    assert (first.name if first else None) == (at_work[0] if at_work else None)


@given(states=st.lists(st.sampled_from(STATES), min_size=1, max_size=6))
def test_jobs_that_lack_sites_take_turns(
    tmp_path_factory: pytest.TempPathFactory, states: list[str]
) -> None:
    """Each is tried once before one is tried again."""
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    for number, state in enumerate(states):
        jobs.put(Submitted(f"job-{number}", state))
    at_work = [one.name for one in jobs.all() if one.state in OPEN]
    passed, tried = "", []
    for _ in range(2 * len(at_work)):
        one = jobs.next(passed)
        assert one is not None
        passed = one.name
        tried.append(passed)
    assert tried == at_work * 2
    if not at_work:
        assert jobs.next("job-0") is None


def test_a_file_of_a_newer_version_is_not_read_as_something_else(jobs: Jobs) -> None:
    (jobs.folder / "a.json").write_text(json.dumps({"name": "a", "state": "waiting", "new": 1}))
    with pytest.raises(TypeError):
        jobs.all()
