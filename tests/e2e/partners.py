"""A federation as partners run it, on this machine: the real commands, nginx, one process a site.

with Partners(tmp_path, job) as partners:
    partners.join_all()
    partners.start_sites()
    run = partners.submit(job)
    partners.until(lambda: partners.state(run) == "finished")

With a ``Network`` each party runs in its own namespace.
"""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from e2e.netlab import Network
from e2e.superlink import PATIENCE, die_with_parent, free_ports

from fedgraft.client.agent.process import make_tls
from fedgraft.client.site_config import load_site
from fedgraft.common.backbones.blob_store import make_manifest
from fedgraft.common.backbones.load import find_backbone
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job
from fedgraft.server.app import coordinate
from fedgraft.server.jobs.queue import OPEN
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare

__all__ = ["NGINX", "Partners"]

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
POLICY: dict[str, dict[str, Any]] = {
    "model": {"allowed_methods": ["lora", "head"], "max_rank": 16},
    "privacy": {
        "secure_aggregation": "allowed",
        "min_cohort": 2,
        "min_examples": 1,
        "min_local_steps": 1,
    },
    "limits": {"max_rounds": 50, "max_bytes_out_per_round": "20MB"},
    "metrics": {"allowed": ["loss", "accuracy", "f1"]},
    "approval": {"mode": "auto"},
}
TAIL = 25
FAULTY = Path(__file__).with_name("faulty_site.py")


class Partners:
    """A coordinator and the sites of the simulation in ``job``; all processes end with it."""

    def __init__(
        self, folder: Path, job: Job, *, lifetime: str = "7d", network: Network | None = None
    ) -> None:
        self.folder = folder
        self.network = network
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(job)
        self.data = {site.name: prepared.folder / site.name for site in prepared.sites}
        self.port, self.watch = free_ports(2)
        self.home, self.kits = folder / "coordinator", folder / "kits"
        self.lifetime = lifetime
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.allowed = {"glyph-vit": f"sha256:{_digest(job)}"}
        self.fingerprint = self.provision()

    @property
    def endpoint(self) -> str:
        """Where sites connect."""
        host = self.network.address("coordinator") if self.network else "127.0.0.1"
        return f"{host}:{self.port}"

    def __enter__(self) -> Self:
        self.start_coordinator()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._explain(error)
        for name in list(self._processes):
            self.end(name)

    # --- commands as people type them

    def call(
        self, *arguments: str, check: bool = True, at: str = "coordinator"
    ) -> subprocess.CompletedProcess[str]:
        """`fedgraft ARGUMENTS`, to its end, where ``at`` is in the network."""
        done = subprocess.run(
            [*self._inside(at), sys.executable, "-m", "fedgraft", *arguments],
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def provision(self) -> str:
        """Found the federation; the fingerprint."""
        plan = {
            "federation": {
                "name": "trial",
                "endpoint": self.endpoint,
                "sites": sorted(self.data),
                "certificate_lifetime": self.lifetime,
            }
        }
        (self.folder / "federation.toml").write_text(tomli_w.dumps(plan))
        where = ("--home", str(self.home), "-o", str(self.kits), "--json")
        done = self.call("provision", "federation.toml", *where)
        return str(json.loads(done.stdout)["fingerprint"])

    def join(self, name: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Have a site join with its kit, and fill in its files."""
        site = self.folder / name
        site.mkdir(exist_ok=True)
        kit = str(self.kits / f"{name}.kit")
        tell = ("--fingerprint", self.fingerprint, "--site", str(site / "site.toml"))
        done = self.call("site", "join", kit, *tell, check=check, at=name)
        data = load_site(self.data[name] / "site.toml").data
        config = {
            "name": name,
            "device": "cpu",
            "federation": "state/roster.toml",
            "policy": "policy.toml",
            "data": data.model_dump(mode="json", exclude_none=True),
        }
        (site / "site.toml").write_text(tomli_w.dumps(config))
        self.write_policy(name)
        return done

    def write_policy(self, name: str, **changes: dict[str, Any]) -> None:
        """Write a site's policy; ``changes`` by section."""
        policy = {key: {**value, **changes.get(key, {})} for key, value in POLICY.items()}
        policy["model"].setdefault("allowed_backbones", self.allowed)
        (self.folder / name / "policy.toml").write_text(tomli_w.dumps(policy))

    def submit(self, job: Job) -> str:
        """Submit a job; the name of its run."""
        path = self.folder / "job.toml"
        path.write_text(dump_job(job))
        done = self.call("submit", str(path), "--home", str(self.home), "--json")
        return str(json.loads(done.stdout)["run"])

    @contextmanager
    def running(self, job: Job) -> Iterator[str]:
        """Submit a job; the name of its run, which is stopped at the end if it still goes on."""
        run = self.submit(job)
        try:
            yield run
        finally:
            if self.state(run) in OPEN:
                self.call("coordinator", "stop", run, "--home", str(self.home))

    def status(self) -> dict[str, Any]:
        """What `fedgraft coordinator status --json` says; empty if there is no coordinator."""
        done = self.call("coordinator", "status", "--home", str(self.home), "--json", check=False)
        return dict(json.loads(done.stdout)) if done.stdout else {}

    # --- what a test waits for, from files, which costs no process

    def state(self, run: str) -> str:
        """The state of a submitted job."""
        return str(json.loads((self.home / "jobs" / f"{run}.json").read_text())["state"])

    def rounds(self, run: str) -> list[dict[str, Any]]:
        """The rounds of a run that are committed."""
        path = self.home / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self) -> list[dict[str, Any]]:
        """The coordinator's audit."""
        path = self.home / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, happened: Callable[[], object], limit: float = PATIENCE) -> None:
        """Wait until ``happened()``.

        Raises:
            TimeoutError: it is not after ``limit`` seconds.
        """
        stop = time.monotonic() + limit
        while not happened():
            if time.monotonic() > stop:
                error = TimeoutError(f"waited {limit:g} s in vain")
                self._explain(error)
                raise error
            time.sleep(0.1)

    # --- processes

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until sites can connect."""
        where = ["--home", str(self.home), "--listen", self.endpoint]
        watch = ["--watch", f"127.0.0.1:{self.watch}"]
        (self.home / "nginx" / "nginx.pid").unlink(missing_ok=True)
        self._start("coordinator", ["-m", "fedgraft", "-v", "coordinator", "run", *where, *watch])
        self.until(lambda: (self.home / "nginx" / "nginx.pid").exists())
        self.until(lambda: "Uvicorn running" in self.read("coordinator/logs/superlink.log"))

    def start_sites(self, names: Sequence[str] = ()) -> None:
        """Start sites (all by default) and wait until they have a session."""
        for name in names or sorted(self.data):
            self.launch_site(name)
        self._wait_for(names or sorted(self.data))

    def start_faulty(self, name: str, *faults: str) -> None:
        """Start a site with ``faults`` and wait until it has a session."""
        self.launch_site(name, *faults)
        self._wait_for([name])

    def launch_site(self, name: str, *faults: str) -> None:
        """Start a site; with ``faults``, as `faulty_site.py` knows them, it has these."""
        config = str(self.folder / name / "site.toml")
        command = ["-m", "fedgraft", "-v", "site", "run", "--site", config]
        self._start(name, [str(FAULTY), config, *faults] if faults else command)

    def _wait_for(self, names: Sequence[str]) -> None:
        for name in names:
            self.until(lambda name=name: "joined as" in self.read(f"{name}.log"))  # type: ignore[misc]

    def join_all(self) -> None:
        """Have every site join."""
        for name in sorted(self.data):
            self.join(name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End a process and wait until it is gone."""
        process = self._processes.pop(name)
        with suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def end(self, name: str) -> None:
        """Have a process end, if it runs."""
        if name in self._processes:
            self.kill(name, signal.SIGTERM)

    def pid(self, name: str) -> int:
        """The process id of a site or of the ``coordinator``."""
        return self._processes[name].pid

    def read(self, name: str) -> str:
        """A log below the folder, as far as it is there."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        """Start Python with ``arguments`` as the process of ``name``."""
        log = self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        with log.open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [*self._inside(name), sys.executable, *arguments],
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )

    def _explain(self, error: BaseException) -> None:
        for log in sorted([*self.folder.glob("*.log"), *self.home.glob("logs/*.log")]):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            error.add_note("\n".join([f"--- end of {log.name}", *lines[-TAIL:]]))

    def _inside(self, name: str) -> list[str]:
        return self.network.inside(name) if self.network else []

    def simulate(self, job: Job, folder: Path, *, without: Sequence[str] = ()) -> Run:
        """The job (in clear) in this process, over the same sites but those ``without``."""
        nodes = [
            {"site": str(data / "site.toml"), "state": str(folder / "sites" / name)}
            for name, data in self.data.items()
            if name not in without
        ]
        with Run.open_or_create(folder / "run", job) as run, Workers(0, device="cpu") as workers:
            coordinate(Transport(LocalGrid(nodes, workers)), job, run)
        return run

    def tls(self, name: str | None) -> ssl.SSLContext:
        """TLS as the site ``name`` speaks it; without a name, as a stranger with the CA's file."""
        ca = self.home / "ca.pem"
        if name is None:
            return ssl.create_default_context(cafile=str(ca))
        state = self.folder / name / "state"
        return make_tls(ca, state / "certificate.pem", state / "tls.key")


def _digest(job: Job) -> str:
    """What a policy allows the job's backbone by."""
    backbone = find_backbone(job.backbone.source)
    if job.backbone.source.startswith("builtin:"):
        return backbone.fingerprint
    return make_manifest(backbone.folder, source=f"path:{backbone.folder.name}").digest


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
