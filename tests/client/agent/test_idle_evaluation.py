"""Results are measured when there is nothing else to do, and only then."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedgraft.client.agent import idle_evaluation
from fedgraft.client.agent.idle_evaluation import LOOK, QUIET, IdleEvaluation

WAITS = [sys.executable, "-c", "import time; time.sleep(60)"]
ENDS = [sys.executable, "-c", ""]
FAILS = [sys.executable, "-c", "raise SystemExit(1)"]


class Idle:
    """A site with results that are not measured; ``command`` stands for measuring one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waiting, self.command = 100.0, ["first", "second"], WAITS
        self.asked: list[list[str]] = []
        self.started: list[subprocess.Popen[bytes]] = []
        self.site = folder / "site.toml"
        self.site.write_text('name = "a"\n[data]\ntrain = "t.jsonl"\n')
        monkeypatch.setattr(idle_evaluation, "list_results", self._results)
        monkeypatch.setattr(idle_evaluation, "read_report", lambda folder: None)
        monkeypatch.setattr("fedgraft.client.agent.idle_evaluation.subprocess.Popen", self._popen)
        self.spare = IdleEvaluation(self.site, folder / "state", clock=lambda: self.now)

    def _results(self, state: Path) -> list[Any]:
        return [SimpleNamespace(run=name, folder=state / name) for name in self.waiting]

    def _popen(self, command: list[str], **_: Any) -> "subprocess.Popen[bytes]":
        self.asked.append(command)
        self.started.append(REAL(self.command))
        return self.started[-1]

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.spare.step()


REAL = subprocess.Popen


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Idle]:
    made = Idle(tmp_path, monkeypatch)
    yield made
    made.spare.interrupt()


def test_it_begins_when_it_has_been_quiet_and_ends_when_a_message_comes(idle: Idle) -> None:
    idle.after(QUIET - 1)
    assert not idle.started
    idle.spare.interrupt()  # a message
    idle.after(QUIET - 1)
    assert not idle.started
    idle.after(2)
    assert idle.asked[0][3:6] == ["site", "results", "first"]
    idle.after(600)
    assert len(idle.started) == 1  # one at a time
    idle.spare.interrupt()
    assert idle.started[0].poll() is not None
    idle.after(QUIET + 1)
    assert idle.asked[1][5] == "first"  # anew


def test_what_failed_is_left_to_a_person_and_the_next_is_measured(idle: Idle) -> None:
    idle.command = FAILS
    idle.after(QUIET + 1)
    idle.started[0].wait()
    idle.command = ENDS
    idle.after(0)
    idle.after(LOOK)
    assert [command[5] for command in idle.asked] == ["first", "second"]


def test_without_results_nothing_is_started(idle: Idle) -> None:
    idle.waiting = []
    for _ in range(5):
        idle.after(QUIET)
    assert not idle.started


def test_outside_of_the_policys_hours_nothing_is_started(
    idle: Idle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy.toml").write_text('[limits]\nhours = "20:00-06:00"\n')
    idle.site.write_text('name = "a"\npolicy = "policy.toml"\n[data]\ntrain = "t.jsonl"\n')
    monkeypatch.setattr(
        "fedgraft.client.policy.policy_file.Hours.include", lambda self, moment: False
    )
    idle.after(QUIET + 1)
    assert not idle.started
    (tmp_path / "policy.toml").write_text("no policy")
    idle.after(LOOK)
    assert not idle.started
