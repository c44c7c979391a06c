"""The heads of sites' audits at the coordinator: a chain that was cut is noticed."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.memberships import NAMES, Coordinator, code_of, enrolment_of, open_federation

from fedgraft.client.membership.credentials import open_member_channel
from fedgraft.common.federation.certificates import make_key
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.common.secagg.keys import Identity
from fedgraft.server.enrollment import service as enrollment
from fedgraft.server.enrollment.provision import renew_kit
from fedgraft.server.enrollment.registry import Registry, Site
from fedgraft.server.enrollment.service import EnrolmentService, MembershipService

A, B, _ = NAMES
ONE, TWO = "ab" * 32, "cd" * 32


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Coordinator]:
    with open_federation(tmp_path) as running:
        running.join(A)
        running.join(B)
        running.events.clear()
        yield running


def tell(members: Coordinator, *heads: tuple[str, int, int, str], site: str = A) -> list[str]:
    """Report heads (run, round, lines, head); the codes of those that were refused."""
    refused = []
    endpoint = f"127.0.0.1:{members.member_port}"
    with open_member_channel(members.state(site), endpoint) as channel:
        stub = services.MembershipStub(channel)
        for run, number, lines, head in heads:
            try:
                stub.ReportHead(pb.HeadRequest(run=run, round=number, lines=lines, head=head))
            except grpc.RpcError as error:
                refused.append(code_of(error)[1])
    return refused


def known(members: Coordinator, site: str = A) -> Site:
    return Registry(members.home).sites()[site]


def kinds(members: Coordinator) -> list[str]:
    return [event["event"] for event in members.events]


def test_the_last_head_is_kept_with_its_round_and_time(members: Coordinator) -> None:
    assert tell(members, ("r1", 1, 20, ONE), ("r1", 2, 31, TWO)) == []
    site = known(members)
    assert (site.audit_lines, site.audit_head) == (31, TWO)
    assert (site.audit_run, site.audit_round, site.audit_lost) == ("r1", 2, 0)
    assert site.audit_time.endswith("+00:00")
    facts = {"site": A, "run": "r1", "round": 2, "lines": 31, "head": TWO}
    assert members.events[-1] == {"event": "audit-head", **facts}
    assert known(members, B).audit_head == ""


@pytest.mark.parametrize(
    "head",
    [("r1", 3, 12, TWO), ("r1", 2, 31, ONE), ("r2", 1, 12, TWO)],
    ids=["fewer lines", "another line", "fewer in another run"],
)
def test_a_chain_that_was_cut_or_changed(
    members: Coordinator, head: tuple[str, int, int, str]
) -> None:
    tell(members, ("r1", 2, 31, TWO), head)
    event = members.events[-1]
    assert event["event"] == "audit-cut"
    assert (event["known_lines"], event["known_head"]) == (31, TWO)
    assert (event["lines"], event["head"]) == head[2:]
    tell(members, ("r3", 1, 900, ONE))  # growing on does not make it good
    assert kinds(members) == ["audit-head", "audit-cut", "audit-head"]
    assert (known(members).audit_lost, known(members).audit_lines) == (31, 900)


def test_the_same_head_again_and_a_late_one_are_no_alarm(members: Coordinator) -> None:
    tell(members, ("r1", 2, 31, TWO), ("r1", 2, 31, TWO), ("r1", 1, 20, ONE))
    assert kinds(members) == ["audit-head", "audit-head"]
    assert (known(members).audit_lines, known(members).audit_lost) == (31, 0)


def test_a_site_cannot_fill_the_coordinators_audit(
    members: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(enrollment, "HEADS", 3)
    events: list[str] = []
    service = MembershipService(members.home, lambda kind, **facts: events.append(kind))
    codes: list[str] = []

    def report(number: int, site: str) -> None:
        context = Calling(site, codes)
        request = pb.HeadRequest(run="r", round=number, lines=number, head=ONE)
        with suppress(RuntimeError):
            service.ReportHead(request, context)  # type: ignore[arg-type]

    for number in range(1, 10):
        report(number, A)
    report(1, B)  # others are not held up
    assert codes == ["too-many-tries"] * 6
    assert events == ["audit-head"] * 4
    clock[0] += 60.1
    report(20, A)
    assert len(events) == 5


class Calling:
    """The context of a call by a member."""

    def __init__(self, site: str, codes: list[str]) -> None:
        self._site, self._codes = site, codes

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("x-site", self._site)]

    def abort(self, status: grpc.StatusCode, details: str) -> None:
        self._codes.append(details)
        raise RuntimeError


@pytest.mark.parametrize("same", [True, False])
def test_a_site_that_joins_anew_has_a_new_audit_only_with_a_new_identity(
    members: Coordinator, same: bool
) -> None:
    key, identity = make_key(), Identity.generate()

    def join(identity: Identity) -> None:
        renew_kit(members.home, A, members.kits)
        request = enrolment_of(members.kit(A), key=key, identity=identity)
        with members.stranger() as channel:
            services.EnrolmentStub(channel).Enrol(request, timeout=20)

    join(identity)
    with Registry(members.home).change() as sites:
        sites[A] = replace(sites[A], audit_lines=31, audit_head=TWO, audit_lost=40)
    join(identity if same else Identity.generate())
    site = known(members)
    assert (site.audit_lines, site.audit_lost) == ((31, 40) if same else (0, 0))


def test_a_stranger_cannot_fill_the_audit(
    members: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    events: list[dict[str, Any]] = []
    service = EnrolmentService(
        members.home, lambda kind, **facts: events.append({"event": kind, **facts})
    )

    def knock(times: int) -> None:
        for number in range(times):
            request = enrolment_of(members.kit(A), site=f"nobody-{number}")
            with pytest.raises(RuntimeError):
                service.Enrol(request, Calling("", []))  # type: ignore[arg-type]

    knock(90)
    assert len(events) == 20
    assert {event["event"] for event in events} == {"enrolment-refused"}
    clock[0] += 60.1
    knock(1)
    assert events[20:] == [
        {"event": "more-refused", "count": 70},
        {"event": "enrolment-refused", "site": "nobody-0", "code": "token-wrong"},
    ]
