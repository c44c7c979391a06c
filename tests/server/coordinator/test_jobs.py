"""Jobs at the coordinator: one at a time, none lost, and none that keeps others waiting."""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.coordinators import World, make_job
from support.memberships import NAMES

from fedgraft.common.config.jobfile import parse_job
from fedgraft.server.coordinator.process import RETRY, TRIES

A = NAMES[0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.coordinator.close()


def test_a_run_gets_the_job_its_folder_and_the_keys_of_the_sites(world: World) -> None:
    world.submit("job-1")
    world.tend()
    (config,) = world.control.started
    assert parse_job(tomllib.loads(config["job"]), where="test") == make_job("job-1")
    assert config["run"] == str((world.home.runs / "job-1").resolve())
    assert config["federation"] == str(world.home.roster.resolve())
    assert config["sealed"]  # only replies that a site signed count
    assert world.told("started") == [{"run": "job-1", "attempt": 1}]


def test_one_after_the_other(world: World) -> None:
    world.submit("job-1", "job-2")
    world.tend()
    world.tend(100)
    assert world.names_started() == ["job-1"]
    world.ends(finished=True)
    world.tend()
    world.tend()
    assert world.state("job-1") == ("finished", 1)
    assert world.told("finished") == [{"run": "job-1"}]
    assert world.names_started() == ["job-1", "job-2"]


def test_a_run_that_failed_goes_on_after_a_while(world: World) -> None:
    world.submit("job-1")
    world.tend()
    world.ends()
    world.tend()
    world.tend(RETRY - 0.1)
    assert world.names_started() == ["job-1"]
    world.tend(0.2)
    assert world.names_started() == ["job-1", "job-1"]
    assert world.state("job-1") == ("running", 2)
    assert world.told("interrupted") == [{"run": "job-1", "attempt": 1}]


def test_one_that_fails_again_and_again_is_given_up_and_the_next_begins(world: World) -> None:
    world.submit("job-1", "job-2")
    for _ in range(TRIES):
        world.tend(RETRY)
        world.ends()
        world.tend()
    assert world.state("job-1") == ("failed", TRIES)
    assert world.told("failed") == [{"run": "job-1"}]
    world.tend(RETRY)
    assert world.names_started()[-1] == "job-2"


def test_waiting_for_sites_is_no_failure(world: World) -> None:
    world.submit("job-1")
    for _ in range(TRIES + 5):
        world.tend(RETRY)
        world.ends(event="waiting")
        world.tend()
    state, tries = world.state("job-1")
    assert state == "running"
    assert tries <= 1
    (line,) = world.coordinator.status()["runs"]
    assert line["why"].startswith("waiting")
    assert len(world.told("started")) == 1  # and not every few seconds
    world.tend(RETRY)
    world.ends(event="round", finished=True)
    (line,) = world.coordinator.status()["runs"]
    assert line["why"] == ""  # it goes on
    world.tend()
    assert world.state("job-1")[0] == "finished"


def test_a_job_that_waits_for_sites_does_not_hold_up_the_others(world: World) -> None:
    world.submit("job-1", "job-2", "job-3")

    def turn(**how: Any) -> None:
        world.tend(RETRY)
        world.ends(**how)
        world.tend()

    turn(event="waiting")
    turn(event="waiting")
    turn(event="waiting")
    turn(event="waiting")  # the first has its turn again
    assert world.names_started() == ["job-1", "job-2", "job-3", "job-1"]
    turn(finished=True)  # job-2; then the oldest comes first
    turn(finished=True)
    turn(finished=True)
    assert world.names_started()[4:] == ["job-2", "job-1", "job-3"]
    assert {world.state(f"job-{n}")[0] for n in (1, 2, 3)} == {"finished"}


def test_a_job_that_the_operator_stops_is_stopped_at_flowers(world: World) -> None:
    world.submit("job-1", "job-2")
    world.tend()
    world.coordinator.jobs.set("job-1", "stopped", "by the operator")
    world.tend()
    assert world.control.stopped == [1]
    world.tend()
    assert world.names_started() == ["job-1", "job-2"]
    assert world.state("job-1") == ("stopped", 1)


@pytest.mark.parametrize("finished", [False, True])
def test_killed_at_any_point_it_goes_on(world: World, finished: bool) -> None:
    world.join(A)
    world.submit("job-1", "job-2")
    world.tend()
    if finished:  # and the coordinator did not see it
        world.ends(finished=True)
    world.begin()
    world.tend()
    world.tend()
    assert world.names_started()[:2] == ["job-1", "job-1"]
    assert world.state("job-1") == ("running", 2)
    world.ends(finished=True)
    world.tend()
    world.tend()
    assert world.names_started()[2:] == ["job-2"]


def until_started(world: World, count: int, step: Callable[[], None]) -> None:
    for _ in range(50):
        if len(world.control.started) >= count:
            return
        step()
    raise AssertionError("it never started")


def test_a_job_that_waited_when_the_coordinator_died_still_lets_others_have_a_turn(
    world: World,
) -> None:
    world.submit("job-1", "job-2")
    world.tend()
    world.ends(event="waiting")
    world.tend()
    world.begin()
    until_started(world, 2, lambda: world.tend(RETRY))
    assert world.ends(event="waiting") == "job-1"
    world.tend()
    until_started(world, 3, lambda: world.tend(RETRY))
    assert world.names_started()[-1] == "job-2"
