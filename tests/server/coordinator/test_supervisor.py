"""Processes that must be there: real ones, small, killed on purpose."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedgraft.server.coordinator import supervisor
from fedgraft.server.coordinator.supervisor import LONGEST, STEADY, Supervised

STUBBORN = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up',flush=1)"
SLEEPS = ["/bin/sleep", "1000"]
Make = Callable[..., Supervised]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(supervisor, "time", made)
    return made


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Supervised] = []

    def build(command: list[str], **more: Any) -> Supervised:
        facts: dict[str, Any] = {"log": tmp_path / "p.log", "environment": os.environ}
        made.append(Supervised("p", lambda: command, **(facts | more)))
        return made[-1]

    yield build
    for one in made:
        one.stop()


def until(happened: Callable[[], object], seconds: float = 10.0) -> None:
    stop = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < stop
        time.sleep(0.01)


def die(one: Supervised) -> None:
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not one.pid)


def test_it_runs_once_however_often_it_is_tended(make: Make) -> None:
    one = make(SLEEPS)
    assert one.pid == 0
    assert one.tend()
    pid = one.pid
    assert pid
    assert [one.tend() for _ in range(5)] == [False] * 5
    assert (one.pid, one.starts) == (pid, 1)


def test_killed_it_is_started_again_and_told(make: Make, clock: Clock) -> None:
    told: list[int] = []
    one = make(SLEEPS, on_start=lambda: told.append(1))
    one.tend()
    die(one)
    assert not one.tend()  # not at once
    clock.now += 0.5
    assert one.tend()
    assert one.pid
    assert (one.starts, len(told)) == (2, 2)


def test_what_cannot_start_is_tried_less_and_less_often(make: Make, clock: Clock) -> None:
    one = make(["/bin/false"])
    one.tend()
    waits = []
    for _ in range(9):
        until(lambda: not one.pid)
        before = clock.now
        while not one.tend():
            clock.now += 0.25
        waits.append(clock.now - before)
    assert waits == [0.5, 1, 2, 4, 8, 16, LONGEST, LONGEST, LONGEST]


def test_one_that_ran_for_long_is_started_again_soon(make: Make, clock: Clock) -> None:
    one = make(SLEEPS)
    for _ in range(6):
        one.tend()
        clock.now += STEADY + 1
        die(one)
        one.tend()
        clock.now += 0.5
        assert one.tend()


def test_the_command_is_asked_anew_for_each_start(tmp_path: Path, clock: Clock) -> None:
    words = iter(["one", "two"])
    one = Supervised(
        "p",
        lambda: ["/bin/echo", next(words)],
        log=tmp_path / "p.log",
        environment={"X": "1"},
    )
    one.tend()
    until(lambda: not one.pid)
    one.tend()
    clock.now += 1
    one.tend()
    until(lambda: not one.pid)
    assert (tmp_path / "p.before.log").read_text() == "one\n"
    assert (tmp_path / "p.log").read_text() == "two\n"


def test_it_gets_the_environment_it_is_given_and_no_input(make: Make, tmp_path: Path) -> None:
    script = "import os,sys; print(sorted(os.environ)); print(repr(sys.stdin.read()), flush=True)"
    one = make([sys.executable, "-I", "-c", script], environment={"ONLY": "this"})
    one.tend()
    until(lambda: not one.pid)
    said = (tmp_path / "p.log").read_text()
    assert "'ONLY'" in said
    assert "PATH" not in said
    assert said.endswith("''\n")


def test_stopped_it_is_asked_first(make: Make) -> None:
    one = make(SLEEPS)
    one.tend()
    process = psutil.Process(one.pid)
    one.stop()
    assert not process.is_running()
    assert one.pid == 0
    one.stop()  # again: nothing
    one.signal(signal.SIGHUP)


def test_what_does_not_listen_is_killed_with_its_children(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "PATIENCE", 0.2)
    script = f"{STUBBORN}\nimport subprocess,sys\n"
    script += f"subprocess.Popen([sys.executable, '-c', {STUBBORN + '; time.sleep(99)'!r}])\n"
    script += "time.sleep(99)"
    one = make([sys.executable, "-c", script])
    one.tend()
    until(lambda: (tmp_path / "p.log").read_text().count("up") == 2)
    tree = [psutil.Process(one.pid), *psutil.Process(one.pid).children()]
    assert len(tree) == 2
    began = time.monotonic()
    one.stop()
    assert not psutil.pid_exists(tree[0].pid)  # and waited for
    until(lambda: not any(each.is_running() and each.status() != "zombie" for each in tree))
    assert 0.2 <= time.monotonic() - began < 5


def test_a_signal_reaches_it(make: Make, tmp_path: Path) -> None:
    script = (
        "import signal,sys,time\n"
        "signal.signal(signal.SIGHUP, lambda *_: (print('heard', flush=True), sys.exit()))\n"
        "print('up', flush=True)\ntime.sleep(99)"
    )
    one = make([sys.executable, "-c", script])
    one.tend()
    until(lambda: "up" in (tmp_path / "p.log").read_text())
    one.signal(signal.SIGHUP)
    until(lambda: "heard" in (tmp_path / "p.log").read_text())


def test_it_does_not_outlive_a_coordinator_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os,time; from pathlib import Path\n"
        "from fedgraft.server.coordinator.supervisor import Supervised\n"
        f"one = Supervised('p', lambda: {SLEEPS!r}, log=Path({str(tmp_path / 'p.log')!r}),"
        " environment=os.environ)\n"
        "one.tend(); print(one.pid, flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    until(lambda: not child.is_running() or child.status() == "zombie")
