"""The coordinator as a process: it keeps Flower and nginx running, and runs the jobs.

``tend`` is called twice a second and does all the work: it starts processes that died, registers
the nodes at a new SuperLink, follows the registry (sites that joined or were revoked), and goes on
with the oldest job. The coordinator keeps its state in files. If it is killed at any point, it goes
on from the last committed round. While the disk is full, the job rests and the status says so.
"""

import os
import shutil
import signal
import socket
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from fedgraft.common.errors import FedgraftError
from fedgraft.server.coordinator.forged_replies import ForgedReplies
from fedgraft.server.coordinator.nginx import NginxConfig, nginx_command, write_nginx_config
from fedgraft.server.coordinator.nginx_refusals import RefusedRequests
from fedgraft.server.coordinator.superlink import (
    FINISHED,
    Control,
    executor_command,
    superlink_command,
)
from fedgraft.server.coordinator.supervisor import Supervised
from fedgraft.server.enrollment.registry import Member, Registry, Site
from fedgraft.server.jobs.progress import Overview
from fedgraft.server.jobs.queue import OPEN, Jobs, Submitted
from fedgraft.server.paths import Home
from fedgraft.server.runs.run_folder import WAITING, Run

__all__ = ["Coordinator"]

RETRY = 5.0  # seconds before a run that failed goes on from its last round
TRIES = 20
POLL = 2.0  # seconds between two checks of the sites that are online
HOST = "127.0.0.1"
LACKS = f"{WAITING}: "  # how the reason of a job begins whose run waits for something
ROOM = 64 << 20  # free bytes on the disk; with fewer, the job rests
TRUST = ("ca.pem", "crl.pem", "server.pem", "server.key")  # nginx reads them beside its own files
Event = Callable[..., None]


class Coordinator:
    """Keeps everything running; ``event`` is called with each event that an auditor needs."""

    def __init__(self, home: Home, *, listen: str, event: Event, nginx: str | None = None) -> None:
        self.home = home
        self.registry = Registry(home.folder)
        self.jobs = Jobs(home.file("jobs"))
        self.nodes: dict[str, int] = {}
        self._registered: dict[str, Member] = {}  # the members of ``nodes``
        self._spent: set[str] = set()  # keys that this SuperLink has unregistered
        self._event = event
        self._port = _free_port()
        self._control: Control | None = None
        self._current: tuple[str, int] | None = None
        self._passed = ""  # a job that lacked sites; the next job runs before it
        self._not_before = 0.0
        self.trouble = ""  # the reason why all jobs rest; empty if they do not
        self._members: dict[str, Member] = {}
        self._trust: list[tuple[int, int]] = []
        self._listen = listen
        for folder in (home.runs, home.sockets, home.logs):
            folder.mkdir(exist_ok=True, mode=0o700)
        # The file is from an earlier start, which had other ports.
        (home.file("nginx") / "nginx.conf").unlink(missing_ok=True)
        self._forgeries = ForgedReplies(home.runs, event)
        found = nginx or shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        self.processes = self._make_processes(found)
        self._overview = Overview(self.jobs, home.runs)
        self._refusals = RefusedRequests(
            home.file("nginx"), event, reopen=lambda: self._signal_front(signal.SIGUSR1)
        )
        self._seen: dict[str, dict[str, Any]] = {}  # the SuperLink's facts about each site
        self._next_poll = 0.0

    @property
    def public(self) -> bool:
        """True if there is an nginx, and therefore a public port."""
        return "front" in self.processes

    def _make_processes(self, nginx: str | None) -> dict[str, Supervised]:
        home, port = self.home, self._port
        tls = {"ca": home.file("ca.pem"), "secret": home.file("secret")}
        server = {"certificate": home.file("server.pem"), "key": home.file("server.key")}
        commands: dict[str, Callable[[], list[str]]] = {
            "superlink": partial(superlink_command, port, **tls, **server),
            "executor": partial(executor_command, port, **tls),
        }
        if nginx:
            commands["front"] = lambda: nginx_command(self._front(), nginx)
        made = {}
        for name, command in commands.items():
            made[name] = Supervised(
                name,
                command,
                log=home.logs / f"{name}.log",
                environment=self._environment(),
                on_start=partial(self._started, name),
            )
        return made

    def _environment(self) -> dict[str, str]:
        flower = self.home.file("flower")  # where Flower unpacks apps
        flower.mkdir(exist_ok=True, mode=0o700)
        return {
            **os.environ,
            # Flower's executor looks for its other commands on PATH.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(flower),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "FEDGRAFT_BACKBONES": str(self.home.file("backbones")),
            "PYTHONUNBUFFERED": "1",
        }

    def _started(self, name: str) -> None:
        process = self.processes[name] if hasattr(self, "processes") else None
        if process and process.starts > 1:
            self._event("restarted", process=name)
        if name == "superlink":  # a new SuperLink knows no node and no run
            self._close_control()
            self.nodes, self._registered, self._spent = {}, {}, set()
            self._current = None
            self._seen = {name: _offline(node) for name, node in self._seen.items()}

    def _front(self) -> NginxConfig:
        keys = {name: member.node_key for name, member in self._members.items()}
        return NginxConfig(self.home.folder.resolve(), self._listen, self._port, keys)

    def tend(self) -> None:
        """Do all tasks once; a task that fails now is tried again at the next call."""
        try:
            self._look_for_room()
            self._follow_registry()
            for process in self.processes.values():
                process.tend()
            self._refusals.tend(self._seen)
            if self._reach_superlink():
                self._register_nodes()
                self._look_at_nodes()
                self._tend_job()
        except FedgraftError as error:
            self._event("superlink", what=str(error))
        except OSError as error:  # most often, the disk is full
            if not self.trouble:  # otherwise it was reported already
                self._event("disk", what=error.strerror)

    def _look_for_room(self) -> None:
        """Set ``trouble`` if the disk is full, and clear it if there is room again."""
        free = shutil.disk_usage(self.home.folder).free
        before, self.trouble = self.trouble, ""
        if free < ROOM:
            self.trouble = f"paused: only {free / 1e6:,.0f} MB free where {self.home.folder} is"
        if bool(before) != bool(self.trouble):
            self._event("disk", what=self.trouble or "there is room again")

    def _follow_registry(self) -> None:
        """Give nginx the current members, certificates and revocation list."""
        self._follow_members()
        trust = [_version(self.home.file(name)) for name in TRUST]
        if trust != self._trust:
            self._trust = trust
            self._signal_front(signal.SIGHUP)

    def _follow_members(self) -> None:
        members = self.registry.members()
        if members == self._members and (self.home.file("nginx") / "nginx.conf").exists():
            return
        self._members = members
        if self.public:
            write_nginx_config(self._front())
            self._signal_front(signal.SIGHUP)
        self._event("members", sites=sorted(members))

    def _signal_front(self, number: signal.Signals) -> None:
        if self.public:
            self.processes["front"].signal(number)

    def _reach_superlink(self) -> bool:
        if self._control is None and _listens(self._port):
            self._control = Control(self._port, self.home.file("ca.pem"))
        return self._control is not None

    def _close_control(self) -> None:
        if self._control:
            self._control.close()
        self._control = None

    def _register_nodes(self) -> None:
        """Register the members' keys at the SuperLink, and unregister all other keys."""
        assert self._control is not None  # noqa: S101  # tend has connected
        for name, was in list(self._registered.items()):
            if self._members.get(name) != was:
                self._spent.add(self._registered.pop(name).node_key)
                self._event("unregistered", site=name)
                self._control.unregister(self.nodes.pop(name))
        if any(member.node_key in self._spent for member in self._members.values()):
            # A site came back with its old key, and Flower does not accept a key a second time.
            self.processes["superlink"].stop()
            return
        for name, member in self._members.items():
            if name not in self.nodes:
                self.nodes[name] = self._control.register(member.public_key, name)
                self._registered[name] = member

    def _look_at_nodes(self) -> None:
        """Record which sites are online; a site that the SuperLink forgot keeps its last record."""
        assert self._control is not None  # noqa: S101  # tend has connected
        if time.monotonic() < self._next_poll:
            return
        self._next_poll = time.monotonic() + POLL
        found = self._control.nodes()
        for name, number in self.nodes.items():
            node = found.get(number, {})
            if node.get("last_seen"):
                self._seen[name] = node

    def _tend_job(self) -> None:
        """Start the oldest open job, or check the running one; stop it while there is trouble."""
        assert self._control is not None  # noqa: S101  # tend has connected
        if self.trouble:
            if self._current is not None:
                self._control.stop(self._current[1])
                self._current = None
            return
        if self._current is None:
            one = self.jobs.next(self._passed)
            if one and time.monotonic() >= self._not_before:
                self._start(one)
            return
        name, run_id = self._current
        if not any(one.name == name and one.state == "running" for one in self.jobs.all()):
            self._control.stop(run_id)
            self._current = None
            return
        status = self._control.status(run_id)
        self._forgeries.tend(name)
        if status == FINISHED:
            self._current = None
            self._ended(name)

    def _start(self, one: Submitted) -> None:
        assert self._control is not None  # noqa: S101  # tend has connected
        config = {
            "job": self.jobs.text(one.name),
            "run": str((self.home.runs / one.name).resolve()),
            "federation": str(self.home.roster.resolve()),
            "sealed": "yes",
        }
        run_id = self._control.start(config)
        self._current = (one.name, run_id)
        self.jobs.set(one.name, "running", one.why)
        if not one.why.startswith(LACKS):  # such a job starts every few seconds
            self._event("started", run=one.name, attempt=one.tries + 1)

    def _ended(self, name: str) -> None:
        """Handle a run that Flower has ended: it is finished if it has a summary.

        Otherwise it goes on later, and after too many tries it has failed.
        """
        self._passed = ""
        if (self.home.runs / name / "summary.json").exists():
            self.jobs.set(name, "finished")
            self._event("finished", run=name)
            return
        one = next(one for one in self.jobs.all() if one.name == name)
        if why := self._waits_for(name):
            if not one.why.startswith(LACKS):
                self._event(WAITING, run=name, why=why)
            self.jobs.put(replace(one, tries=max(one.tries - 1, 0), why=LACKS + why))
            self._passed = name
            self._not_before = time.monotonic() + RETRY
            return
        if one.tries >= TRIES:
            self.jobs.set(name, "failed", "it failed too often; logs/executor.log says why")
            self._event("failed", run=name)
            return
        self._not_before = time.monotonic() + RETRY
        self._event("interrupted", run=name, attempt=one.tries)

    def _waits_for(self, name: str) -> str:
        """Return what the run waits for, by its last event; empty if it does not wait."""
        event = self._last_event(name)
        return str(event["what"]) if event.get("event") == WAITING else ""

    def _last_event(self, name: str) -> dict[str, Any]:
        folder = self.home.runs / name
        events = Run(folder).events() if (folder / "run.json").exists() else []
        return events[-1] if events else {}

    def status(self) -> dict[str, Any]:
        """Return the status that `fedgraft coordinator status`, the page and the figures show.

        ``totals`` are counted from the start of this process. Times are Unix seconds.
        """
        processes = {
            name: {"pid": each.pid, "starts": each.starts} for name, each in self.processes.items()
        }
        return {
            "time": time.time(),
            "listen": self._listen if self.public else "",
            "processes": processes,
            "sites": [
                {
                    "site": name,
                    "state": site.state,
                    **_seen(self._seen.get(name, {}), site.state),
                    "audit": _audit(site),
                }
                for name, site in sorted(self.registry.sites().items())
            ],
            "runs": [self._explained(line) for line in self._overview.lines()],
            "refused": list(self._refusals.recent),
            "second_sessions": dict(self._refusals.alarms),
            "totals": {
                **self._overview.totals(),
                "refused": dict(self._refusals.totals),
                "restarts": {
                    name: max(each.starts - 1, 0) for name, each in self.processes.items()
                },
            },
        }

    def _explained(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return a run's line with the reason why it rests; without it if rounds go on again."""
        if self.trouble and line["state"] in OPEN:
            return {**line, "why": self.trouble}
        waited = line["state"] in OPEN and line["why"].startswith(LACKS)
        if waited and self._last_event(line["run"]).get("event") == "round":
            return {**line, "why": ""}
        return line

    def close(self) -> None:
        """End all processes and report the refusals that are not reported yet."""
        self._close_control()
        for process in reversed(self.processes.values()):
            process.stop()
        self._refusals.close()


def _seen(node: Mapping[str, Any], state: str) -> dict[str, Any]:
    connected = state == "joined" and node.get("status") == "online"
    return {"connected": connected, "last_seen": node.get("last_seen")}


def _audit(site: Site) -> dict[str, Any]:
    """Return the last audit head that a site reported.

    ``lost`` is the number of lines that the site had reported, if a later head did not contain
    them.
    """
    return {
        "lines": site.audit_lines,
        "head": site.audit_head,
        "run": site.audit_run,
        "round": site.audit_round,
        "time": datetime.fromisoformat(site.audit_time).timestamp() if site.audit_time else None,
        "lost": site.audit_lost,
    }


def _version(path: Path) -> tuple[int, int]:
    """Return a value that changes with the file's content.

    Inode and time are enough, because these files are replaced and never written in place.
    """
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _offline(node: Mapping[str, Any]) -> dict[str, Any]:
    return {**node, "status": "offline"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
