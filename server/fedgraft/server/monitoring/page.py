"""A status page and Prometheus figures of the coordinator, for users of this machine.

Both show the same status and keep no state: a run or a site that leaves the status is no longer
shown. They listen only on loopback and answer only GET. They also answer only under a local host
name: otherwise a web page in a browser on this machine could point its own host name at this
address and read them.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.server.monitoring.status import (
    alarms,
    down,
    process_rows,
    refused_rows,
    run_rows,
    site_rows,
)

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ImportError:  # the extra `coordinator`
    CollectorRegistry = None

__all__ = ["Monitor", "parse_address", "render_figures", "render_page"]

LOCAL = ("127.0.0.1", "localhost")
STATES = ("waiting", "running", "finished", "failed", "stopped")
SITE_STATES = ("invited", "joined", "revoked")
TEXT, HTML = "text/plain; charset=utf-8", "text/html; charset=utf-8"
FIGURES = "text/plain; version=0.0.4; charset=utf-8"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LACKING = "no figures: prometheus-client is missing\nhint: pip install 'fedgraft[coordinator]'\n"
SECONDS = 10.0  # in which a client must send its request
Facts = Mapping[str, Any]


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of a loopback address.

    Raises:
        InputError: ``text`` is not an address, or other machines could reach it.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise InputError(f"{text!r} is no ADDRESS:PORT", hint="--watch 127.0.0.1:9464")
    if host not in LOCAL:
        raise InputError(
            f"the figures would be open to others on {host or 'every address'}",
            hint="--watch 127.0.0.1:PORT; from elsewhere, look through ssh -L",
        )
    return "127.0.0.1", int(port)


class Monitor:
    """Serves ``status`` at ``address``; use it as a context manager.

    Raises:
        InputError: the address is not loopback, or is in use.
    """

    def __init__(self, address: str, status: Callable[[], Facts]) -> None:
        place = parse_address(address)
        handler = type("Handler", (_Handler,), {"status": staticmethod(status)})
        try:
            self._server = _Server(place, handler)
        except OSError as error:
            raise InputError(
                f"nothing can listen on {address}: {error.strerror}",
                hint="another one: --watch 127.0.0.1:PORT; or none: --watch ''",
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, daemon=True, name="monitor"
        )

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients may go away, and other errors were answered."""


class _Handler(BaseHTTPRequestHandler):
    status: Callable[[], Facts]
    timeout = SECONDS
    server_version, sys_version = "fedgraft", ""

    def do_GET(self) -> None:
        """Answer with the page, the figures or an error."""
        try:
            code, kind, text = self._answer()
        except FedgraftError as error:
            code, kind, text = HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"{error}\n"
        except Exception as error:
            code, kind = HTTPStatus.INTERNAL_SERVER_ERROR, TEXT
            text = f"{type(error).__name__}\n"
        self._send(code, kind, text.encode("utf-8", "replace"))

    def _answer(self) -> tuple[HTTPStatus, str, str]:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in LOCAL:
            return HTTPStatus.FORBIDDEN, TEXT, "only under 127.0.0.1 or localhost\n"
        path = self.path.partition("?")[0]
        if path == "/":
            return HTTPStatus.OK, HTML, render_page(self.status())
        if path != "/metrics":
            return HTTPStatus.NOT_FOUND, TEXT, "there are / and /metrics\n"
        if CollectorRegistry is None:
            return HTTPStatus.NOT_IMPLEMENTED, TEXT, LACKING
        return HTTPStatus.OK, FIGURES, render_figures(self.status())

    def _send(self, code: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def render_page(facts: Facts) -> str:
    """Return the HTML page of a status."""
    return _template().render(
        facts=facts,
        down=down(facts),
        alarms=alarms(facts),
        processes=process_rows(facts),
        sites=site_rows(facts),
        runs=run_rows(facts),
        refused=refused_rows(facts),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def render_figures(facts: Facts) -> str:
    """Return a status in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(facts))
    return str(generate_latest(registry).decode())


class _Snapshot:
    """One status as a Prometheus collector; there are figures only for facts in the status."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterable[Any]:
        """Yield all metric families."""
        yield from self._sites()
        yield from self._runs()
        totals = self._facts["totals"]
        yield _counter("fedgraft_bytes", "Bytes from and to sites.", "direction", totals["bytes"])
        text = "Updates that did not count."
        yield _counter("fedgraft_dropped_updates", text, "reason", totals["dropped"])
        text = "Requests refused at the public port."
        yield _counter("fedgraft_refused_requests", text, "code", totals["refused"])
        text = "Times that a process was started again."
        yield _counter("fedgraft_restarts", text, "process", totals["restarts"])

    def _sites(self) -> Iterable[Any]:
        sites = self._facts["sites"]
        found = [site["state"] for site in sites]
        yield _gauge(
            "fedgraft_sites",
            "Sites by state.",
            ("state",),
            {(state,): found.count(state) for state in SITE_STATES},
        )
        yield _gauge(
            "fedgraft_site_last_seen_seconds",
            "Unix time at which a joined site was last heard.",
            ("site",),
            {
                (site["site"],): site["last_seen"]
                for site in sites
                if site["state"] == "joined" and site["last_seen"] is not None
            },
        )

    def _runs(self) -> Iterable[Any]:
        runs = self._facts["runs"]
        rounds = {(run["run"],): run["rounds"] for run in runs}
        yield _gauge("fedgraft_round", "Rounds of a run that are committed.", ("run",), rounds)
        seconds = {(run["run"],): run["seconds"] for run in runs if run["seconds"] is not None}
        text = "Seconds that the last round of a run took."
        yield _gauge("fedgraft_round_seconds", text, ("run",), seconds)
        states = {
            (run["run"], state): float(run["state"] == state) for run in runs for state in STATES
        }
        text = "1 for the state that a run is in, 0 for the others."
        yield _gauge("fedgraft_run_state", text, ("run", "state"), states)


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Any:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Any:
    family = CounterMetricFamily(name, f"{text} Since the coordinator started.", labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
