"""Who runs and who is let in: what the coordinator keeps up, and what it follows."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.coordinators import World
from support.memberships import NAMES

from fedgraft.common.errors import FedgraftError
from fedgraft.server.enrollment.provision import revoke

A, B, C = NAMES


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.coordinator.close()


# --- processes


def pid(world: World, name: str) -> int:
    return int(world.coordinator.status()["processes"][name]["pid"])


def kill(world: World, name: str) -> None:
    os.kill(pid(world, name), signal.SIGKILL)
    stop = time.time() + 10
    while pid(world, name):
        assert time.time() < stop


def test_what_dies_is_started_again_and_told(world: World) -> None:
    world.tend()
    before = {name: pid(world, name) for name in ("superlink", "executor", "front")}
    assert all(before.values())
    kill(world, "executor")
    world.tend()
    world.tend(1.0)
    assert pid(world, "executor") not in (0, before["executor"])
    assert pid(world, "superlink") == before["superlink"]
    assert world.told("restarted") == [{"process": "executor"}]


def test_a_superlink_that_starts_again_is_told_everything_anew(world: World) -> None:
    world.join(A, B)
    world.submit("job-1")
    world.tend()
    world.tend()
    assert world.names_started() == ["job-1"]
    kill(world, "superlink")
    world.control.nodes_.clear()
    world.tend()
    world.tend(1.0)
    world.tend()
    assert world.control.asked.count(f"register {A}") == 2
    assert len(world.control.nodes_) == 2
    assert world.names_started() == ["job-1", "job-1"]  # it goes on from its last round
    assert world.state("job-1") == ("running", 2)


def test_nothing_is_asked_of_a_superlink_that_does_not_listen_yet(world: World) -> None:
    world.listening = False
    world.join(A)
    world.submit("job-1")
    world.tend()
    assert world.control.asked == []
    world.listening = True
    world.tend()
    world.tend()
    assert world.names_started() == ["job-1"]


def test_a_superlink_that_answers_nonsense_stops_nothing(world: World) -> None:
    world.join(A)
    world.submit("job-1")
    world.control.fault = FedgraftError("the SuperLink answers 500", hint="look at its log")
    world.tend()
    assert world.told("superlink") == [{"what": "the SuperLink answers 500"}]
    world.control.fault = None
    world.tend()
    world.tend()
    assert world.names_started() == ["job-1"]


def test_all_end_with_the_coordinator(world: World) -> None:
    world.tend()
    pids = [pid(world, name) for name in ("superlink", "executor", "front")]
    world.coordinator.close()
    for number in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


# --- members


def nginx_names(world: World) -> set[str]:
    text = (world.home.folder / "nginx" / "nginx.conf").read_text()
    return set(re.findall(r'"CN=(\S+)" \S+;', text))


def test_who_joins_is_let_through_and_registered(world: World) -> None:
    world.tend()
    assert nginx_names(world) == set()
    keys = world.join(A)
    world.tend()
    assert nginx_names(world) == {A}
    assert list(world.control.nodes_.values()) == [keys[A]]
    more = world.join(B)
    world.tend()
    assert nginx_names(world) == {A, B}
    assert set(world.control.nodes_.values()) == {keys[A], more[B]}
    assert [facts["sites"] for facts in world.told("members")] == [[], [A], [A, B]]


def test_who_is_revoked_is_shut_out_and_unregistered(world: World) -> None:
    keys = world.join(A, B)
    world.tend()
    revoke(world.home.folder, A)
    world.tend()
    assert nginx_names(world) == {B}
    assert list(world.control.nodes_.values()) == [keys[B]]
    assert world.told("unregistered") == [{"site": A}]


def test_nothing_is_written_while_nothing_changes(world: World) -> None:
    world.join(A)
    world.tend()
    path = world.home.folder / "nginx" / "nginx.conf"
    before = path.stat()
    for _ in range(5):
        world.tend(1.0)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert world.control.asked.count(f"register {A}") == 1


def test_a_configuration_that_was_removed_is_written_again(world: World) -> None:
    world.join(A)
    world.tend()
    (world.home.folder / "nginx" / "nginx.conf").unlink()
    world.tend()
    assert nginx_names(world) == {A}


def test_nginx_listens_where_this_start_says_also_before_anybody_joins(world: World) -> None:
    world.tend()
    world.begin(listen="127.0.0.1:2")
    world.tend()
    text = (world.home.folder / "nginx" / "nginx.conf").read_text()
    assert "listen 127.0.0.1:2 ssl" in text
