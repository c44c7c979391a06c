"""A federation of real Flower processes on this machine, to run jobs over and to break.

    with Federation(tmp_path, {"site-00": folder / "site.toml", ...}) as federation:
        federation.submit(job, tmp_path / "run")
        federation.until(lambda: "train message" in federation.log("site-00"))
        federation.kill("site-00")
        status = federation.wait()

One SuperLink, and for each site a SuperNode with its SuperExec, which gives every message a process
of its own: the commands of Flower, over HTTP, with ``deploy/app`` as what is submitted. Python and
torch take longer to start than a tiny job takes to run, so the processes are forked from one that
has imported everything; with ``warm=False`` they are started as Flower ships them.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import tomli_w

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job

__all__ = ["PATIENCE", "Federation", "die_with_parent", "free_ports"]

APP = Path(__file__).parents[2] / "deploy" / "app"
HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PAUSE = 0.1  # seconds between questions for work, where Flower would wait up to 3
# seconds: a test that waits in vain ends then; one that waits for a busy machine does not
PATIENCE = 600.0
GONE = 10.0  # seconds; for a killed process to be gone
TAIL = 30  # lines of each log that a failure shows

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(PAUSE),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}

# One server for all federations of a test run; it ends with the process that started it. There
# torch takes OMP_NUM_THREADS from conftest.py: on more threads a site computes other last bits.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "fedgraft.client.app",
        "fedgraft.server.app",
        "flwr.superlink.cli",
        "flwr.supernode.cli",
        "flwr.supercore.cli.flower_superexec",
    ]
)


@dataclass(frozen=True)
class _Party:
    """A site or the coordinator: the processes of one group, which die together."""

    name: str
    log: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes] | ForkServerProcess]

    @property
    def group(self) -> int:
        """The process group, that of the first process; 0 before there is one."""
        return int(self.processes[0].pid or 0) if self.processes else 0


class Federation:
    """A SuperLink and the SuperNodes of ``sites`` (name: its ``site.toml``) below ``folder``.

    Use as a context manager: whatever happens, all processes are gone after it. An error that
    leaves it carries the end of every log.
    """

    def __init__(self, folder: Path, sites: Mapping[str, Path], *, warm: bool = True) -> None:
        self.folder = folder
        self._sites = dict(sites)
        self._warm = warm
        self._parties: dict[str, _Party] = {}
        self._stream: subprocess.Popen[bytes] | None = None
        port, *self._ports = free_ports(1 + len(sites))
        self.address = f"{HOST}:{port}"

    def __enter__(self) -> Self:
        try:
            self._start_coordinator()
            self._start_sites()
        except BaseException as error:
            self._explain(error)
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._explain(error)
        self.close()

    def submit(self, job: Job, run: Path, **config: str) -> None:
        """Submit ``job`` to run in the folder ``run``; ``config``: more of the run's keys."""
        text = tomli_w.dumps({"job": dump_job(job), "run": str(run), **config})
        overrides = self.folder / "run-config.toml"
        overrides.write_text(text, encoding="utf-8")
        # The stream of the coordinator's log ends when the run does.
        command = ["flwr", "run", str(APP), "--run-config", str(overrides), "--stream"]
        self._stream = self._popen(self._parties["coordinator"], command, "flwr")

    def until(self, happened: Callable[[], object], limit: float = PATIENCE) -> None:
        """Wait until ``happened()`` is true, asked often.

        Raises:
            TimeoutError: it is not after ``limit`` seconds, or the run ended without it.
        """
        stop = time.monotonic() + limit
        while not happened():
            if self._stream is not None and self._stream.poll() is not None and not happened():
                raise TimeoutError("the run ended without what was waited for")
            if time.monotonic() > stop:
                raise TimeoutError(f"waited {limit:g} s in vain")
            time.sleep(0.02)

    def wait(self, limit: float = PATIENCE) -> str:
        """Wait for the end of the submitted run; its status as Flower tells it.

        Raises:
            TimeoutError: it has not ended after ``limit`` seconds.
        """
        assert self._stream is not None, "nothing was submitted"
        stop = time.monotonic() + limit
        try:
            self._stream.wait(limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the run has not ended after {limit:g} s") from None
        while not (status := self._status()).startswith("finished"):
            if time.monotonic() > stop:
                raise TimeoutError(f"the run is {status!r} after {limit:g} s")
            time.sleep(PAUSE)
        return status

    def kill(self, name: str) -> None:
        """Kill every process of a site (or of the ``coordinator``) at once, with SIGKILL."""
        party = self._parties[name]
        for process in party.processes:
            with suppress(ProcessLookupError):
                process.kill()
        if party.group:
            with suppress(ProcessLookupError):
                os.killpg(party.group, signal.SIGKILL)
        for process in party.processes:
            _reap(process)

    def alive(self, name: str) -> bool:
        """Whether any process of a site (or of the ``coordinator``) is left."""
        group = self._parties[name].group
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return group > 0

    def log(self, name: str) -> str:
        """What the processes of ``name`` (a site or the ``coordinator``) have printed so far."""
        return self._parties[name].log.read_text(encoding="utf-8", errors="replace")

    def state(self, site: str) -> Path:
        """The folder in which ``site`` keeps what it must remember."""
        return self.folder / "state" / site

    def close(self) -> None:
        """Kill everything that still runs.

        Raises:
            TimeoutError: something cannot be killed.
        """
        if self._stream is not None:
            self._stream.kill()
            self._stream.wait()
        for name in self._parties:
            self.kill(name)
        stop = time.monotonic() + GONE
        while left := [name for name in self._parties if self.alive(name)]:
            if time.monotonic() > stop:
                raise TimeoutError(f"processes of {', '.join(left)} cannot be killed")
            time.sleep(0.02)

    def _start_coordinator(self) -> None:
        party = self._party("coordinator")
        connection = {"default": "here", "here": {"address": self.address, "insecure": True}}
        home = Path(party.environment["FLWR_HOME"])
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": connection}))
        port = self.address.rpartition(":")[2]
        link = ["flower-superlink", "--insecure", "--isolation", "process"]
        self._start(party, [*link, "--host", HOST, "--port", port])
        self.until(lambda: _listens(int(port)))
        self._start_executor(party, self.address)

    def _start_sites(self) -> None:
        for (name, config), port in zip(self._sites.items(), self._ports, strict=True):
            node = f'site="{config}" state="{self.state(name)}" device="cpu"'
            command = ["flower-supernode", "--insecure", "--isolation", "process"]
            command += ["--superlink", self.address, "--host", HOST, "--port", str(port)]
            self._start(self._party(name), [*command, "--node-config", node])
        # The coordinator begins with min_sites of them: a test begins with all.
        for name, port in zip(self._sites, self._ports, strict=True):
            self.until(partial(self._joined, name))
            self._start_executor(self._parties[name], f"{HOST}:{port}")

    def _joined(self, name: str) -> bool:
        return "SuperNode ID" in self.log(name)

    def _start_executor(self, party: _Party, address: str) -> None:
        command = ["flower-superexec", "--insecure", "--runtime-api-address", address]
        self._start(party, command)

    def _party(self, name: str) -> _Party:
        home = self.folder / "flower" / name  # its own: Flower unpacks apps there
        home.mkdir(parents=True)
        log = self.folder / f"{name}.log"
        log.touch()
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}
        self._parties[name] = _Party(name, log, environment, [])
        return self._parties[name]

    def _start(self, party: _Party, command: Sequence[str]) -> None:
        """Start ``command`` as another process of the party."""
        if not self._warm:
            party.processes.append(self._popen(party, command, party.name, party.group))
            return
        arguments = (tuple(command), party.group, str(party.log), party.environment)
        process = FORKS.Process(target=_become, args=arguments, daemon=True)
        process.start()
        party.processes.append(process)

    def _popen(
        self, party: _Party, command: Sequence[str], log: str, group: int = 0
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                command,
                env=party.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=group,
                preexec_fn=die_with_parent,
            )

    def _status(self) -> str:
        environment = self._parties["coordinator"].environment
        command = ["flwr", "list", "--format", "json"]
        done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        (run,) = json.loads(done.stdout)["runs"]
        return str(run["status"])

    def _explain(self, error: BaseException) -> None:
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            error.add_note("\n".join([f"--- end of {log}", *lines[-TAIL:]]))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _reap(process: subprocess.Popen[bytes] | ForkServerProcess) -> None:
    if isinstance(process, subprocess.Popen):
        process.wait(GONE)
    else:
        process.join(GONE)


def die_with_parent() -> None:
    """In a new process: have it killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# What follows runs in forked processes.


def _become(command: Sequence[str], group: int, log: str, environment: Mapping[str, str]) -> None:
    """Be the process that ``command`` starts, with all imports behind it."""
    os.setpgid(0, group)
    multiprocessing.set_start_method(None, force=True)  # not what its own processes start with
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a task's process ended
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supernode import start_client_internal

    subprocess_executor.subprocess = SimpleNamespace(Popen=_fork, DEVNULL=None)
    start_client_internal.time = SimpleNamespace(sleep=lambda wait: time.sleep(min(wait, PAUSE)))
    _call(command)


def _end_with_the_test() -> None:
    test = multiprocessing.parent_process()
    if test is not None:
        test.join()
    os.killpg(0, signal.SIGKILL)


def _fork(command: Sequence[str], **streams: Any) -> None:
    """Start ``command`` as a SuperExec does, but in a copy of this process."""
    if os.fork():
        return
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _call(command)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(command: Sequence[str]) -> None:
    sys.argv = list(command)
    (script,) = entry_points(group="console_scripts", name=command[0])
    script.load()()
