"""The verbs of a coordinator: run it, submit a job, show its status, stop a run."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import AuditError, FedgraftError
from fedgraft.server.cli.options import HERE, HomeFolder, JobFile, Json, Overrides

if TYPE_CHECKING:
    from fedgraft.common.federation.audit_log import Audit
    from fedgraft.server.coordinator.process import Coordinator

__all__ = ["run", "status", "stop", "submit"]

TICK = 0.5  # seconds
LATEST = 10  # runs that are shown


def run(
    home: HomeFolder = HERE,
    listen: Annotated[
        str, typer.Option(help="ADDRESS:PORT of the public port; absent: that of the endpoint.")
    ] = "",
    watch: Annotated[
        str, typer.Option(help="127.0.0.1:PORT of a page and of /metrics; empty: neither.")
    ] = "127.0.0.1:9464",
) -> None:
    """Run the coordinator until it is stopped: Flower, nginx, our services, the submitted jobs."""
    # We start processes beside gRPC's threads, but only by exec, so gRPC need not support forks.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from fedgraft.common.federation.audit_log import Audit
    from fedgraft.common.files import lock_folder
    from fedgraft.server.coordinator.grpc_services import serve_operators, serve_sites
    from fedgraft.server.coordinator.nginx import addresses_for, check_listen
    from fedgraft.server.coordinator.process import Coordinator
    from fedgraft.server.enrollment.provision import load_federation_spec
    from fedgraft.server.enrollment.registry import Registry
    from fedgraft.server.paths import Home

    console, stopping = Console(), threading.Event()
    Registry(home).sites()
    spec = load_federation_spec(home / "federation.toml")
    listen = listen or addresses_for(spec.host, spec.port)
    if used := check_listen(listen):
        console.note(f"{used}; waiting for it to end")
    with lock_folder(home):
        events = _Events(Audit(home / "audit.jsonl"), console)
        coordinator = Coordinator(Home(home.resolve()), listen=listen, event=events.report)
        with _watched(coordinator, watch, console):
            servers = [serve_sites(home.resolve(), events.record)]
            servers.append(serve_operators(home.resolve(), _operator(coordinator, stopping)))
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopping.set())
            if coordinator.public:
                console.note(f"sites connect to {listen}")
            else:
                console.note("no nginx on PATH: there is no public port, and no site can connect")
            try:
                while not stopping.wait(TICK):
                    coordinator.tend()
            finally:
                for server in servers:
                    server.stop(1.0)
                coordinator.close()


@dataclass(frozen=True)
class _Events:
    """The coordinator's events: each is written to the audit and shown on the console."""

    audit: "Audit"
    console: Console

    def record(self, kind: str, **facts: Any) -> None:
        """Record an event.

        Raises:
            AuditError: the audit cannot be written; what the event is about must not happen.
        """
        self.audit.append({"event": kind, **facts})
        self.console.note(f"{kind}  {_words(facts)}")

    def report(self, kind: str, **facts: Any) -> None:
        """Report an event that cannot be undone.

        A failed audit write must not stop the coordinator.
        """
        try:
            self.record(kind, **facts)
        except AuditError as error:
            self.console.note(f"{kind}  {_words(facts)}  (not recorded: {error})")


@contextmanager
def _watched(coordinator: "Coordinator", address: str, console: Console) -> Iterator[None]:
    """Serve the page and the figures at ``address``, if it is one."""
    if not address:
        yield
        return
    from fedgraft.server.monitoring.page import Monitor

    with Monitor(address, coordinator.status) as monitor:
        console.note(f"watch it at http://127.0.0.1:{monitor.port}/")
        yield


def _operator(coordinator: "Coordinator", stopping: threading.Event) -> Any:
    from fedgraft.server.coordinator.grpc_services import OperatorService
    from fedgraft.server.jobs.submission import prepare_job

    def take(text: str) -> str:
        name, job = prepare_job(text, coordinator.home)
        return coordinator.jobs.submit(name, job).name

    def halt(name: str) -> None:
        if name:
            coordinator.jobs.set(name, "stopped", "by the operator")
        else:
            stopping.set()

    return OperatorService(take, coordinator.status, halt)


def submit(
    job: JobFile,
    home: HomeFolder = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Give the running coordinator a job; it runs when those before it have ended."""
    from fedgraft.common.config.jobfile import dump_job, load_job
    from fedgraft.common.rpc import fedgraft_v1_pb2 as pb

    console = Console(as_json=as_json)
    text = dump_job(load_job(job, tuple(overrides or ())))
    reply = _ask(home, lambda stub: stub.Submit(pb.SubmitRequest(job=text), timeout=600))
    console.json({"run": reply.run, "folder": str(home / "runs" / reply.run)})
    console.text(f"submitted as {reply.run}\nnext: fedgraft coordinator status --home {home}")


def status(home: HomeFolder = HERE, as_json: Json = False) -> None:
    """Processes, sites and runs of the running coordinator; exit code 1 if a process is down."""
    import json

    from fedgraft.common.rpc import fedgraft_v1_pb2 as pb

    console = Console(as_json=as_json)
    reply = _ask(home, lambda stub: stub.Status(pb.StatusRequest(), timeout=30))
    facts = json.loads(reply.status)
    console.json(facts)
    _show(console, facts)
    if any(not each["pid"] for each in facts["processes"].values()):
        raise typer.Exit(1)


def _show(console: Console, facts: dict[str, Any]) -> None:
    from fedgraft.server.monitoring.status import (
        alarms,
        process_rows,
        refused_rows,
        run_rows,
        site_rows,
    )

    for alarm in alarms(facts):
        console.text(f"ALARM  {alarm}")
    rows = [[each["name"], each["restarts"], each["state"]] for each in process_rows(facts)]
    console.table("Processes", ["process", "started again", "state"], rows)
    if not facts["listen"]:
        console.text("no nginx on PATH: there is no public port, and no site can connect\n")
    sites = site_rows(facts)
    columns = ["site", "state", "connected", "seen", "audit"]
    titles = ["site", "state", "connected", "last seen", "its audit, told"]
    console.table("Sites", titles, [[each[key] for key in columns] for each in sites])
    runs = run_rows(facts)[:LATEST]
    columns = ["run", "state", "round", "left", "up", "down", "dropped"]
    titles = ["run", "state", "rounds", "left", "up", "down", "dropped"]
    console.table("Runs", titles, [[each[key] for key in columns] for each in runs])
    for each in runs:
        for line in filter(None, [each["why"], *each["told"]]):
            console.text(f"{each['run']}  {line}")
    if refused := refused_rows(facts):
        columns = ["site", "status", "count", "when", "path"]
        rows = [[each[key] for key in columns] for each in refused]
        console.table("Refused at the public port", ["who", "answer", "times", "", "path"], rows)


def stop(
    run: Annotated[str, typer.Argument(help="Name of a run; without one, the coordinator.")] = "",
    home: HomeFolder = HERE,
) -> None:
    """Stop a run for good, or the coordinator; an unfinished run goes on at its next start."""
    from fedgraft.common.rpc import fedgraft_v1_pb2 as pb

    _ask(home, lambda stub: stub.Stop(pb.StopRequest(run=run), timeout=30))
    Console().text(f"stopped {run}" if run else "the coordinator stops")


def _ask(home: Path, question: Any) -> Any:
    """Send ``question`` to the running coordinator and return its answer."""
    import json

    import grpc

    from fedgraft.common.messages.grpc_channel import open_channel
    from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import OperatorStub

    path = home.resolve() / "run" / "operator.sock"
    try:
        with open_channel(f"unix:{path}") as channel:
            return question(OperatorStub(channel))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.INTERNAL:
            hint = "look at what the coordinator printed"
            raise FedgraftError("the coordinator could not do it", hint=hint) from None
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            raise FedgraftError(
                f"no coordinator runs in {home}", hint=f"fedgraft coordinator run --home {home}"
            ) from None
        said = json.loads(str(error.details()))
    failure = FedgraftError(said["error"], hint=said["hint"])
    failure.exit_code = int(said["code"])
    raise failure


def _words(facts: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in facts.items())
