"""What the coordinator sees to: processes, members and jobs, with a SuperLink that only says so.

Its processes are real and small. Nothing here knows how the coordinator remembers things: it is
tended, and then its files, its events and what it asked of the SuperLink are looked at.
"""

import base64
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memberships import NAMES, write_plan

from fedgraft.common.certificates import make_key, public_pem
from fedgraft.common.errors import FedgraftError
from fedgraft.common.job import Job
from fedgraft.common.jobfile import parse_job
from fedgraft.server import coordinator as module
from fedgraft.server.coordinator import RETRY, TRIES, Coordinator
from fedgraft.server.home import Home
from fedgraft.server.provision import found, revoke
from fedgraft.server.registry import Registry
from fedgraft.server.runs import Run

A, B, C = NAMES


def make_job(name: str) -> Job:
    raw = {
        "job": {"name": name, "task": "image-classification", "labels": ["a", "b"]},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "head"},
    }
    return parse_job(raw, where="test")


class Control:
    """A SuperLink's Control API; a start of the process forgets everything, as the real one."""

    def __init__(self) -> None:
        self.nodes_: dict[int, bytes] = {}
        self.started: list[Mapping[str, str]] = []
        self.stopped: list[int] = []
        self.over: set[int] = set()
        self.asked: list[str] = []
        self.fault: FedgraftError | None = None
        self._count = 100

    def register(self, public_key: bytes, name: str) -> int:
        self._say(f"register {name}")
        self._count += 1
        self.nodes_[self._count] = public_key
        return self._count

    def unregister(self, node_id: int) -> None:
        self._say("unregister")
        del self.nodes_[node_id]

    def start(self, config: Mapping[str, str]) -> int:
        self._say("start")
        self.started.append(config)
        return len(self.started)

    def stop(self, run_id: int) -> None:
        self._say("stop")
        self.stopped.append(run_id)

    def status(self, run_id: int) -> tuple[str, str]:
        self._say("status")
        return ("finished" if run_id in self.over else "running", "")

    def nodes(self) -> dict[int, dict[str, Any]]:
        return {
            number: {"status": "online", "public_key": key, "activated": None, "last_seen": 1.0}
            for number, key in self.nodes_.items()
        }

    def close(self) -> None:
        self.asked.append("close")

    def _say(self, what: str) -> None:
        self.asked.append(what)
        if self.fault:
            raise self.fault


class World:
    """A coordinator whose clock is moved by hand, and what it told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found(write_plan(folder), folder / "coordinator", folder / "kits")
        self.home = Home(folder / "coordinator")
        self.control = Control()
        self.now = 1000.0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.listening = True
        for name in ("superlink_command", "executor_command"):
            monkeypatch.setattr(module, name, lambda *_, **__: ["/bin/sleep", "1000"])
        monkeypatch.setattr(module, "front_command", lambda *_: ["/bin/sleep", "1000"])
        monkeypatch.setattr(module, "Control", lambda *_: self.control)
        monkeypatch.setattr(module, "_listens", lambda port: self.listening)
        monkeypatch.setattr("fedgraft.server.coordinator.time.monotonic", lambda: self.now)
        self.coordinators: list[Coordinator] = []
        self.begin()

    def begin(self, *, listen: str = "127.0.0.1:1") -> None:
        """Another coordinator over the same folder, as after kill -9."""
        for one in self.coordinators:
            one.close()
        made = Coordinator(self.home, listen=listen, event=self._event, nginx="/bin/false")
        self.coordinators.append(made)

    @property
    def coordinator(self) -> Coordinator:
        return self.coordinators[-1]

    def _event(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts))

    def tend(self, seconds: float = 0.0) -> None:
        """Let time pass, then see to everything once."""
        self.now += seconds
        self.coordinator.tend()

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [facts for one, facts in self.events if one == kind]

    def join(self, *names: str) -> dict[str, bytes]:
        """Have sites join; their public keys."""
        keys = {name: public_pem(make_key().public_key()) for name in names}
        with Registry(self.home.folder).change() as sites:
            for name, key in keys.items():
                node_key = base64.b64encode(key).decode()
                identity = os.urandom(32).hex()
                sites[name] = replace(
                    sites[name], state="joined", node_key=node_key, identity=identity
                )
        return keys

    def submit(self, *names: str) -> None:
        for name in names:
            self.coordinator.jobs.submit(name, make_job(name))

    def ends(self, *, event: str = "", finished: bool = False) -> str:
        """The run that was started last ends, having noted ``event``; its name."""
        name = Path(self.control.started[-1]["run"]).name
        with Run.open_or_create(self.home.runs / name, make_job(name)) as run:
            if event:
                run.event(event, what="too few")
        if finished:
            (self.home.runs / name / "summary.json").write_text("{}")
        self.control.over.add(len(self.control.started))
        return name

    def state(self, name: str) -> tuple[str, int]:
        found = json.loads((self.home.folder / "jobs" / f"{name}.json").read_text())
        return str(found["state"]), int(found["tries"])

    def names_started(self) -> list[str]:
        return [Path(config["run"]).name for config in self.control.started]


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


# --- jobs


def test_a_run_gets_the_job_its_folder_and_the_keys_of_the_sites(world: World) -> None:
    world.submit("job-1")
    world.tend()
    (config,) = world.control.started
    import tomllib

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
    world.ends(finished=True)
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
