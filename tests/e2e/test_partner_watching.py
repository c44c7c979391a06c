"""What an operator sees of a federation of real processes: figures, page, status and alarms."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e.partners import NGINX, Partners
from support.federations import digits_job, write_digits
from support.report_runs import assert_sound

from fedgraft.client.agent.superlink_session import SessionAlive, SuperLinkSession
from fedgraft.client.membership.credentials import load_tls_key, open_member_channel
from fedgraft.common.config.job import Job
from fedgraft.common.federation.audit_log import Audit, verify
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

pytestmark = [
    pytest.mark.slow,  # a session counts as alive for a minute
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]
prometheus = pytest.importorskip("prometheus_client.parser")


def job_of(folder: Path) -> Job:
    options = ("rounds.count=2", "rounds.min_sites=3", "rounds.deadline='60s'")
    return digits_job(*write_digits(folder / "digits", 60, 30), *options)


@pytest.fixture
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("w")
    with Partners(folder, job_of(folder)) as running:
        running.join_all()
        running.start_sites()
        yield running


def figures(partners: Partners) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"http://127.0.0.1:{partners.watch}/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in prometheus.text_string_to_metric_families(text)
        for sample in family.samples
    }


def told(partners: Partners, kind: str, **facts: Any) -> list[dict[str, Any]]:
    return [
        event
        for event in partners.events()
        if event["event"] == kind and all(event.get(key) == facts[key] for key in facts)
    ]


def be_refused(partners: Partners) -> None:
    """A second session with a site's key, and a stranger who looks around."""
    key = load_tls_key(partners.folder / "site-00" / "state")
    with (
        pytest.raises(SessionAlive),
        SuperLinkSession(partners.endpoint, partners.tls("site-00"), key),
    ):
        pass
    with httpx.Client(verify=partners.tls(None)) as client:
        for _ in range(3):
            assert client.get(f"https://{partners.endpoint}/docs").status_code == 404


def tell_head(partners: Partners, run: str) -> int:
    """Report the head of a site's audit; its lines."""
    state = partners.folder / "site-01" / "state"
    head = Audit(state / "audit.jsonl").head
    with open_member_channel(state, partners.endpoint) as channel:
        request = pb.HeadRequest(run=run, round=2, lines=head.lines, head=head.hash)
        services.MembershipStub(channel).ReportHead(request, timeout=20)
    return head.lines


def test_an_operator_sees_what_goes_on(partners: Partners) -> None:
    be_refused(partners)
    refused = time.monotonic()
    run = partners.submit(job_of(partners.folder))
    partners.until(lambda: partners.state(run) == "finished")

    seen = figures(partners)
    assert seen["fedgraft_sites", "joined"] == 3
    assert seen["fedgraft_round", run] == 2
    assert seen["fedgraft_run_state", run, "finished"] == 1
    assert seen["fedgraft_round_seconds", run] > 0
    history = partners.rounds(run)
    for way in ("up", "down"):
        assert seen["fedgraft_bytes_total", way] == sum(line[f"bytes_{way}"] for line in history)
    for name in partners.data:
        assert time.time() - 60 < seen["fedgraft_site_last_seen_seconds", name] <= time.time()
    assert seen["fedgraft_refused_requests_total", "404"] == 3
    assert seen["fedgraft_refused_requests_total", "412"] >= 1
    assert seen["fedgraft_restarts_total", "superlink"] == 0

    lines = tell_head(partners, run)
    site = next(one for one in partners.status()["sites"] if one["site"] == "site-01")
    assert (site["connected"], site["audit"]["lines"]) == (True, lines)
    assert (site["audit"]["run"], site["audit"]["round"]) == (run, 2)
    shown = partners.call("coordinator", "status", "--home", str(partners.home)).stdout
    assert "s ago" in shown

    page = httpx.get(f"http://127.0.0.1:{partners.watch}/")
    assert_sound(page.text)
    for words in (run, "site-02", "finished", "2 of 2", f"line {lines:,}, round 2"):
        assert words in page.text
    stranger = httpx.get(f"http://127.0.0.1:{partners.watch}/", headers={"Host": "evil.example"})
    assert stranger.status_code == 403

    partners.until(lambda: told(partners, "second-session"), 130 - (time.monotonic() - refused))
    assert [one["site"] for one in told(partners, "second-session")] == ["site-00"]
    (line,) = told(partners, "refused", status=412)
    assert (line["site"], line["certificate"]) == ("site-00", "SUCCESS")
    (line,) = told(partners, "refused", status=404)
    assert (line["site"], line["path"], line["count"]) == ("", "/docs", 3)
    assert "site-00 runs twice" in httpx.get(f"http://127.0.0.1:{partners.watch}/").text

    os.kill(partners.status()["processes"]["superlink"]["pid"], signal.SIGKILL)
    partners.until(lambda: figures(partners)["fedgraft_restarts_total", "superlink"] == 1, 30)
    assert figures(partners)["fedgraft_site_last_seen_seconds", "site-00"] > 0
    verify(partners.home / "audit.jsonl")
