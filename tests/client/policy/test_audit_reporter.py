"""The head of the audit goes to the coordinator, and its absence stops nothing."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.memberships import Coordinator, open_federation

from fedgraft.client.membership.credentials import load_membership
from fedgraft.client.policy.audit_reporter import AuditReporter, report_audit_head
from fedgraft.common.errors import AuditError, FedgraftError
from fedgraft.common.federation.audit_log import Audit, AuditHead, verify
from fedgraft.server.enrollment.registry import Registry

SITE = "hospital-a"


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """Each test its own: a coordinator does not take a head of fewer lines for the newest."""
    with open_federation(tmp_path_factory.mktemp("f")) as running:
        running.join(SITE)
        yield running


@pytest.fixture
def audit(federation: Coordinator) -> Audit:
    return Audit(federation.state(SITE) / "audit.jsonl")


def held(federation: Coordinator) -> AuditHead:
    site = Registry(federation.home).sites()[SITE]
    return AuditHead(site.audit_lines, site.audit_head)


def until(happened: Callable[[], bool]) -> None:
    stop = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < stop
        time.sleep(0.02)


def test_the_head_is_reported_with_its_run_and_round(federation: Coordinator, audit: Audit) -> None:
    state = federation.state(SITE)
    member = load_membership(state)
    assert report_audit_head(member, state) is None  # there is no audit yet
    audit.append({"run": "ab" * 16, "round": 3})
    head = audit.append({"run": "ab" * 16, "round": 4})
    assert report_audit_head(member, state) == head == held(federation)
    event = federation.events[-1]
    assert (event["event"], event["site"], event["round"]) == ("audit-head", SITE, 4)
    count = len(federation.events)
    assert report_audit_head(member, state, head) == head
    assert len(federation.events) == count  # it is known there


def test_a_past_that_was_rewritten_does_not_fit_what_the_coordinator_holds(
    federation: Coordinator, audit: Audit
) -> None:
    state = federation.state(SITE)
    for number in range(3):
        audit.append({"round": number})
    report_audit_head(load_membership(state), state)
    audit.append({"round": 3})
    assert verify(audit.path, held(federation)) == 4
    audit.path.unlink()
    for number in range(4):
        audit.append({"round": number})
    with pytest.raises(AuditError, match="is not the one that is known"):
        verify(audit.path, held(federation))


def test_the_thread_reports_the_newest_and_what_is_left_at_the_end(
    federation: Coordinator, audit: Audit
) -> None:
    state = federation.state(SITE)
    reporter = AuditReporter(load_membership(state), state, every=0.05)
    audit.append({"round": 1})
    reporter.wake()
    until(lambda: held(federation) == audit.head)
    audit.append({"round": 2})
    reporter.wake()
    until(lambda: held(federation) == audit.head)
    slow = AuditReporter(load_membership(state), state, every=600)
    slow.wake()
    time.sleep(0.3)
    last = audit.append({"round": 3})
    slow.wake()
    slow.close()
    assert held(federation) == last
    reporter.close()


def test_a_coordinator_that_is_away_costs_a_warning_and_is_told_later(
    federation: Coordinator,
    audit: Audit,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = federation.state(SITE)
    audit.append({"round": 1})

    def refuse(*_: object) -> None:
        raise FedgraftError("the coordinator does not answer", hint="doctor")

    monkeypatch.setattr("fedgraft.client.policy.audit_reporter.ask", refuse)
    reporter = AuditReporter(load_membership(state), state, every=0.05, again=0.1)
    with caplog.at_level(logging.WARNING, "fedgraft.client"):
        reporter.wake()
        until(lambda: "was not reported" in caplog.text)
    monkeypatch.undo()
    until(lambda: held(federation) == audit.head)  # nobody had to wake it again
    reporter.close()


def test_a_damaged_audit_is_not_reported(
    federation: Coordinator, audit: Audit, tmp_path: Path
) -> None:
    audit.append({"round": 1})
    audit.path.write_text(audit.path.read_text().replace('"round":1', '"round":2'))
    with pytest.raises(AuditError):
        report_audit_head(load_membership(federation.state(SITE)), federation.state(SITE))
