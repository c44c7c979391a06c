"""A coordinator with a SuperLink that only says so; its processes are real and small.

Nothing here knows how the coordinator remembers things: it is tended, and then its files, its
events and what it asked of the SuperLink are looked at.
"""

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.memberships import write_plan

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import FedgraftError
from fedgraft.common.federation.certificates import make_key, public_pem
from fedgraft.server.coordinator import process as module
from fedgraft.server.coordinator.process import Coordinator
from fedgraft.server.enrollment.provision import found
from fedgraft.server.enrollment.registry import Registry
from fedgraft.server.paths import Home
from fedgraft.server.runs.run_folder import Run

__all__ = ["World", "make_job"]


def make_job(name: str = "t") -> Job:
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

    def status(self, run_id: int) -> str:
        self._say("status")
        return "finished" if run_id in self.over else "running"

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
        monkeypatch.setattr(module, "nginx_command", lambda *_: ["/bin/sleep", "1000"])
        monkeypatch.setattr(module, "Control", lambda *_: self.control)
        monkeypatch.setattr(module, "_listens", lambda port: self.listening)
        monkeypatch.setattr("fedgraft.server.coordinator.process.time.monotonic", lambda: self.now)
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
