"""The page and the figures: what they say, to whom, and that nothing said by a stranger runs."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import assert_sound, visible
from support.standings import NOW, Facts, make_status

from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.server.monitoring import page as monitor
from fedgraft.server.monitoring.page import Monitor, parse_address, render_figures, render_page

prometheus = pytest.importorskip("prometheus_client.parser")
FOLDER = Path(__file__).parents[3] / "deploy/observability"
NASTY = "<script>alert(1)</script>\"'&{{ 7*7 }}\x1b[31m\n"


def figures_of(facts: Facts) -> dict[tuple[str, ...], float]:
    """What Prometheus reads: value by name and the values of the labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in prometheus.text_string_to_metric_families(render_figures(facts))
        for sample in family.samples
    }


# --- figures


def test_every_figure_of_a_status() -> None:
    expected: dict[tuple[str, ...], float] = {
        ("fedgraft_sites", "invited"): 1,
        ("fedgraft_sites", "joined"): 2,
        ("fedgraft_sites", "revoked"): 1,
        ("fedgraft_site_last_seen_seconds", "hospital-a"): NOW - 12,
        ("fedgraft_site_last_seen_seconds", "hospital-b"): NOW - 4000,
        ("fedgraft_round", "r1"): 0,
        ("fedgraft_round", "r2"): 4,
        ("fedgraft_round_seconds", "r2"): 61,
        **{
            ("fedgraft_run_state", run, state): float(state == now)
            for run, now in (("r1", "failed"), ("r2", "running"))
            for state in ("waiting", "running", "finished", "failed", "stopped")
        },
        ("fedgraft_bytes_total", "up"): 3_000_000,
        ("fedgraft_bytes_total", "down"): 4_500_000,
        ("fedgraft_dropped_updates_total", "not-finite"): 1,
        ("fedgraft_dropped_updates_total", "deadline"): 2,
        ("fedgraft_refused_requests_total", "404"): 1,
        ("fedgraft_refused_requests_total", "400"): 1200,
        ("fedgraft_refused_requests_total", "412"): 9,
        ("fedgraft_restarts_total", "superlink"): 0,
        ("fedgraft_restarts_total", "executor"): 2,
        ("fedgraft_restarts_total", "front"): 0,
    }
    assert figures_of(make_status()) == expected


def asked_of_us() -> str:
    """The questions of the alerts and of the dashboard, one a line."""
    panels = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = (FOLDER / "alerts.yml").read_text(encoding="utf-8")
    return "\n".join([*asked, rules])


def test_every_figure_that_deploy_asks_for_is_exported_with_its_labels() -> None:
    families = prometheus.text_string_to_metric_families(render_figures(make_status()))
    given = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    asked = asked_of_us()
    assert set(re.findall(r"fedgraft_\w+", asked)) == set(given)
    for name, labels in re.findall(r"(fedgraft_\w+)\{\s*([^}]*)\}", asked):
        assert set(re.findall(r"(\w+)[!=~]+\"", labels)) <= given[name]
    by = re.findall(r"by \((\w+)\) \((?:\w+\()?(fedgraft_\w+)", asked)
    assert len(by) >= 5
    for label, name in by:
        assert label in given[name]


def test_names_in_labels_are_escaped() -> None:
    facts = make_status()
    facts["totals"]["dropped"] = {'a"b\\c\nd': 1}
    assert figures_of(facts)["fedgraft_dropped_updates_total", 'a"b\\c\nd'] == 1


def test_an_empty_federation_has_figures() -> None:
    totals: dict[str, Any] = {"bytes": {}, "dropped": {}, "refused": {}, "restarts": {}}
    facts = make_status(sites=[], runs=[], refused=[], processes={}, totals=totals)
    assert figures_of(facts) == {
        ("fedgraft_sites", state): 0 for state in ("invited", "joined", "revoked")
    }


# --- the page


def test_the_page_says_what_there_is() -> None:
    page = render_page(make_status())
    assert_sound(page)
    seen = visible(page)
    for words in (
        "1 of 2 joined sites connected", "sites connect to 0.0.0.0:8443",
        "hospital-a", "12 s ago", "line 1,204, round 4 of r2",
        "line 7, round 4 of r2, CUT", "Alarm: hospital-b had told 1,100 lines of its audit",
        "never", "not told", "2027-01-13 00:26 UTC",
        "4 of 10", "3.0 MB", "4.5 MB", "dropped updates: not-finite (1), deadline (2)",
        "waiting for 3 sites: hospital-b (site-unreachable)", "it failed too often",
        "a stranger", "somebody as hospital-d", "/v1/fleet/activate-node", "1,200", "412: 9",
        "400: 1,200", "runs, process 12",
    ):  # fmt: skip
        assert words in seen, words
    assert "is down" not in seen


def test_alarms_come_first() -> None:
    facts = make_status(listen="", second_sessions={"hospital-a": NOW - 300})
    facts["processes"]["executor"]["pid"] = 0
    page = render_page(facts)
    assert "<title>DOWN: executor" in page
    assert page.count('role="alert"') == 3
    assert page.rindex('role="alert"') < page.index("<table")
    for words in ("executor is down", "hospital-a runs twice", "5 min 0 s ago"):
        assert words in visible(page)
    assert "no public port" in visible(page)


def test_an_empty_page() -> None:
    page = render_page(make_status(sites=[], runs=[], refused=[]))
    assert_sound(page)
    assert "none yet: fedgraft submit job.toml" in visible(page)


def test_nothing_that_others_say_becomes_a_part_of_the_page() -> None:
    facts = make_status()
    facts["sites"][0]["site"] = facts["sites"][0]["audit"]["run"] = NASTY
    for key in ("run", "why", "state"):
        facts["runs"][1][key] = NASTY
    facts["runs"][1] |= {"reasons": {NASTY: 1}, "warnings": [NASTY]}
    facts["refused"][0] |= {"site": NASTY, "path": NASTY}
    facts["totals"]["refused"] = {NASTY: 1}
    page = render_page(facts)
    assert_sound(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert ">49<" not in page


# --- who may ask


@contextmanager
def watching(status: Callable[[], Facts] = make_status) -> Iterator[int]:
    with Monitor("127.0.0.1:0", status) as running:
        yield running.port


def ask(
    port: int, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, text


def test_it_answers_the_page_the_figures_and_nothing_else() -> None:
    with watching() as port:
        code, headers, page = ask(port)
        assert (code, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "hospital-a" in page
        code, headers, text = ask(port, "/metrics?x=1")
        assert code == 200
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'fedgraft_round{run="r2"} 4.0' in text
        for path in ("/x", "/metrics/", "/../etc/passwd"):
            assert ask(port, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, method=method)[0] == 501


def test_a_browser_may_run_and_load_nothing() -> None:
    with watching() as port:
        for path in ("/", "/metrics", "/x"):
            headers = ask(port, path)[1]
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:9464", 200),
        ("localhost", 200),
        ("localhost:1", 200),
        ("evil.example", 403),
        ("evil.example:9464", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:x:9464", 403),
        ("", 403),
    ],
)
def test_only_under_a_local_name(host: str, code: int) -> None:
    """A page of another site can have its name point here: the browser then sends that name."""
    with watching() as port:
        for path in ("/", "/metrics"):
            got, _, text = ask(port, path, Host=host)
            assert got == code
            assert ("hospital-a" in text) == (code == 200)


def test_it_listens_on_loopback_alone() -> None:
    with watching() as port, pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=2)


def test_a_fault_says_its_class_and_no_more() -> None:
    def broken() -> Facts:
        raise RuntimeError("a secret")

    def damaged() -> Facts:
        raise FedgraftError("sites.json is damaged", hint="")

    with watching(broken) as port:
        assert ask(port)[::2] == (500, "RuntimeError\n")
    with watching(damaged) as port:
        assert ask(port, "/metrics")[::2] == (503, "sites.json is damaged\n")


def test_figures_without_prometheus_client_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitor, "CollectorRegistry", None)
    with watching() as port:
        code, _, text = ask(port, "/metrics")
        assert code == 501
        assert "pip install 'fedgraft[coordinator]'" in text
        assert ask(port)[0] == 200


def test_a_client_that_says_nothing_holds_nobody_up() -> None:
    with watching() as port, socket.create_connection(("127.0.0.1", port)):
        assert ask(port)[0] == 200
    assert not [one for one in threading.enumerate() if one.name == "monitor"]


def test_the_port_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as port, pytest.raises(InputError, match="nothing can listen") as error:
        Monitor(f"127.0.0.1:{port}", make_status)
    assert "--watch" in error.value.hint


@pytest.mark.parametrize("text", ["127.0.0.1:9464", "localhost:9464"])
def test_addresses(text: str) -> None:
    assert parse_address(text) == ("127.0.0.1", 9464)


@pytest.mark.parametrize("text", ["9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "a:٣"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(InputError):
        parse_address(text)


@pytest.mark.parametrize("text", [":9464", "0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464"])
def test_addresses_that_others_reach(text: str) -> None:
    with pytest.raises(InputError, match="open to others"):
        parse_address(text)
