"""Enrolment and membership as a coordinator answers them, over TLS: who is let in, who is not."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.memberships import NAMES, Coordinator, code_of, enrolment_of, open_federation

from fedgraft.client.membership.credentials import load_tls_key, open_member_channel
from fedgraft.common.federation.certificates import (
    key_to_pem,
    make_csr,
    make_key,
    public_pem,
    revoked,
    serial,
    site_of,
)
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.common.secagg.keys import Identity
from fedgraft.server.enrollment import service as enrollment
from fedgraft.server.enrollment.provision import renew_kit, revoke
from fedgraft.server.enrollment.registry import Registry
from fedgraft.server.enrollment.service import EnrolmentService

A, B, C = NAMES
DENIED = "PERMISSION_DENIED"


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with open_federation(tmp_path) as running:
        yield running


def enrol(coordinator: Coordinator, request: pb.EnrolRequest) -> Any:
    with coordinator.stranger() as channel:
        return services.EnrolmentStub(channel).Enrol(request, timeout=20)


def refusal(coordinator: Coordinator, request: pb.EnrolRequest) -> tuple[str, str]:
    """Status and details of an enrolment that must fail, and leave the registry as it is."""
    before = (coordinator.home / "sites.json").read_bytes()
    with pytest.raises(grpc.RpcError) as error:
        enrol(coordinator, request)
    assert (coordinator.home / "sites.json").read_bytes() == before
    return code_of(error.value)


def member_stub(coordinator: Coordinator, name: str) -> tuple[grpc.Channel, Any]:
    endpoint = f"127.0.0.1:{coordinator.member_port}"
    channel = open_member_channel(coordinator.state(name), endpoint)
    return channel, services.MembershipStub(channel)


# --- a site joins


def test_a_site_is_let_in_with_what_it_proved(coordinator: Coordinator) -> None:
    key, identity, kit = make_key(), Identity.generate(), coordinator.kit(A)
    reply = enrol(coordinator, enrolment_of(kit, key=key, identity=identity))
    ca = (coordinator.home / "ca.pem").read_bytes()
    assert site_of(reply.certificate, ca, key.public_key(), datetime.now(UTC)) == A
    site = Registry(coordinator.home).sites()[A]
    assert site.state == "joined"
    assert base64.b64decode(site.node_key) == public_pem(key)
    assert site.identity == identity.public.hex()
    assert [one.serial for one in site.certificates] == [serial(reply.certificate)]
    assert reply.roster == (coordinator.home / "roster.toml").read_bytes()
    assert coordinator.events == [{"event": "enrolled", "site": A}]


def test_a_kit_is_good_once(coordinator: Coordinator) -> None:
    request = enrolment_of(coordinator.kit(A))
    enrol(coordinator, request)
    assert refusal(coordinator, request) == (DENIED, "token-used")
    assert refusal(coordinator, enrolment_of(coordinator.kit(A))) == (DENIED, "token-used")
    assert coordinator.events[-1] == {
        "event": "enrolment-refused",
        "site": A,
        "code": "token-used",
    }


def test_a_kit_that_has_expired(coordinator: Coordinator) -> None:
    kit = coordinator.kit(A)
    with Registry(coordinator.home).change() as sites:
        past = datetime.now(UTC) - timedelta(seconds=1)
        sites[A] = replace(sites[A], kit_expires=past.isoformat())
    assert refusal(coordinator, enrolment_of(kit)) == (DENIED, "kit-expired")


def test_a_revoked_site_and_a_renewed_kit(coordinator: Coordinator) -> None:
    old = coordinator.kit(A)
    revoke(coordinator.home, A)
    assert refusal(coordinator, enrolment_of(old)) == (DENIED, "site-revoked")
    renew_kit(coordinator.home, A, coordinator.kits)
    assert refusal(coordinator, enrolment_of(old)) == (DENIED, "token-wrong")
    enrol(coordinator, enrolment_of(coordinator.kit(A)))


def test_who_has_no_token_does_not_learn_how_a_site_stands(coordinator: Coordinator) -> None:
    enrol(coordinator, enrolment_of(coordinator.kit(A)))
    revoke(coordinator.home, B)
    for name in (A, B, C, "nobody"):
        request = enrolment_of(coordinator.kit(C), site=name, token="x" * 43)
        assert refusal(coordinator, request) == (DENIED, "token-wrong")


def test_a_token_is_for_its_own_site(coordinator: Coordinator) -> None:
    request = enrolment_of(coordinator.kit(A), site=B)
    assert refusal(coordinator, request) == (DENIED, "token-wrong")


def test_a_stolen_token_lets_one_in_and_the_other_is_told(coordinator: Coordinator) -> None:
    """Whoever comes second learns of it: that is why the hint says to tell the coordinator."""
    kit, thief = coordinator.kit(A), make_key()
    enrol(coordinator, enrolment_of(kit, key=thief))
    assert refusal(coordinator, enrolment_of(kit)) == (DENIED, "token-used")
    site = Registry(coordinator.home).sites()[A]
    assert base64.b64decode(site.node_key) == public_pem(thief)
    renew_kit(coordinator.home, A, coordinator.kits)
    dead = {one.serial for one in site.certificates}
    assert revoked((coordinator.home / "crl.pem").read_bytes()) == dead


def swapped(request: pb.EnrolRequest, **changes: bytes) -> pb.EnrolRequest:
    changed = pb.EnrolRequest()
    changed.CopyFrom(request)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def test_a_request_that_does_not_hold_together(coordinator: Coordinator) -> None:
    kit = coordinator.kit(A)
    good, other = enrolment_of(kit), enrolment_of(kit)
    for wrong in (
        swapped(good, csr=other.csr),  # another key than the identity signed for
        swapped(good, identity=other.identity),
        swapped(good, proof=other.proof),
        swapped(good, proof=b""),
        swapped(good, identity=b"short"),
        swapped(good, csr=b"no request"),
        swapped(good, csr=good.csr + b"\n" * 5000),
        pb.EnrolRequest(site=A, token=kit.token),
    ):
        assert refusal(coordinator, wrong) == ("INVALID_ARGUMENT", "bad-request")
    enrol(coordinator, good)  # none of it has used the kit up


@pytest.mark.parametrize("shared", ["key", "identity"])
def test_two_sites_cannot_have_one_key(coordinator: Coordinator, shared: str) -> None:
    one = {"key": make_key(), "identity": Identity.generate()}
    enrol(coordinator, enrolment_of(coordinator.kit(A), **one))
    request = enrolment_of(coordinator.kit(B), **{shared: one[shared]})
    assert refusal(coordinator, request) == ("INVALID_ARGUMENT", "bad-request")


def test_wrong_tokens_are_counted_for_each_site(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("fedgraft.server.enrollment.service.time.monotonic", lambda: clock[0])
    right, wrong = coordinator.kit(A), enrolment_of(coordinator.kit(A), token="x" * 43)
    for _ in range(10):
        assert refusal(coordinator, wrong) == (DENIED, "token-wrong")
    too_many = ("RESOURCE_EXHAUSTED", "too-many-tries")
    assert refusal(coordinator, wrong) == too_many
    assert refusal(coordinator, enrolment_of(right)) == too_many
    enrol(coordinator, enrolment_of(coordinator.kit(B)))  # other sites are not held up
    clock[0] += 60.1
    enrol(coordinator, enrolment_of(right))


def test_names_of_nobody_fill_no_memory(tmp_path: Path) -> None:
    with open_federation(tmp_path) as coordinator:
        service = EnrolmentService(coordinator.home, lambda kind, **facts: None)
        for number in range(30):
            request = enrolment_of(coordinator.kit(A), site=f"nobody-{number}")
            with pytest.raises(RuntimeError):
                service.Enrol(request, Aborting())  # type: ignore[arg-type]
        assert len(service._pace._times) == 1


class Aborting:
    def abort(self, status: grpc.StatusCode, details: str) -> None:
        raise RuntimeError(details)


def test_many_enrol_at_once_and_each_is_kept(tmp_path: Path) -> None:
    names = [f"site-{number:02}" for number in range(16)]
    with open_federation(tmp_path, names) as coordinator:
        requests = [enrolment_of(coordinator.kit(name)) for name in names]
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda request: enrol(coordinator, request), requests))
        sites = Registry(coordinator.home).sites()
        for request in requests:
            assert sites[request.site].state == "joined"
            assert sites[request.site].identity == request.identity.hex()


def test_of_many_with_one_token_one_is_let_in(coordinator: Coordinator) -> None:
    requests = [enrolment_of(coordinator.kit(A)) for _ in range(12)]

    def attempt(request: pb.EnrolRequest) -> str:
        try:
            enrol(coordinator, request)
        except grpc.RpcError as error:
            return code_of(error)[1]
        return request.identity.hex()

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(attempt, requests))
    (winner,) = [answer for answer in answers if answer != "token-used"]
    assert Registry(coordinator.home).sites()[A].identity == winner


def test_a_fault_of_ours_says_nothing_and_uses_nothing_up(coordinator: Coordinator) -> None:
    key = coordinator.home / "ca.key"
    content = key.read_bytes()
    request = enrolment_of(coordinator.kit(A))
    for broken in (b"not a key", None):
        key.unlink()
        if broken:
            key.write_bytes(broken)
        assert refusal(coordinator, request) == ("INTERNAL", "fault")
        assert coordinator.events[-1]["code"] == "fault"
        key.write_bytes(content)
    enrol(coordinator, request)


def test_what_cannot_be_recorded_is_not_done(coordinator: Coordinator) -> None:
    def full(kind: str, **facts: object) -> None:
        if kind == "enrolled":
            raise OSError("no space left on device")

    before = (coordinator.home / "sites.json").read_bytes()
    with pytest.raises(RuntimeError, match=r"^fault$"):
        EnrolmentService(coordinator.home, full).Enrol(enrolment_of(coordinator.kit(A)), Aborting())  # type: ignore[arg-type]
    assert (coordinator.home / "sites.json").read_bytes() == before


def test_events_hold_no_secret_and_no_foreign_text(coordinator: Coordinator) -> None:
    request = enrolment_of(coordinator.kit(A), site="x\n\x1b[31m{}" + "y" * 500)
    refusal(coordinator, request)
    refusal(coordinator, swapped(enrolment_of(coordinator.kit(A)), csr=b"SECRET"))
    enrol(coordinator, enrolment_of(coordinator.kit(A)))
    said = json.dumps(coordinator.events)
    assert coordinator.kit(A).token not in said
    assert "SECRET" not in said
    assert max(len(event["site"]) for event in coordinator.events) <= 64
    assert "\\" not in said


# --- members


@pytest.fixture
def members(coordinator: Coordinator) -> Coordinator:
    for name in (A, B):
        coordinator.join(name)
    return coordinator


def test_renewal_is_for_the_same_key_and_all_certificates_can_be_revoked(
    members: Coordinator,
) -> None:
    key, ca = load_tls_key(members.state(A)), (members.home / "ca.pem").read_bytes()
    channel, stub = member_stub(members, A)
    with channel:
        renewed = [stub.Renew(pb.RenewRequest(csr=make_csr(key, A))) for _ in range(5)]
    for reply in renewed:
        assert site_of(reply.certificate, ca, key.public_key(), datetime.now(UTC)) == A
    issued = {serial(reply.certificate) for reply in renewed}
    issued.add(serial((members.state(A) / "certificate.pem").read_bytes()))
    revoke(members.home, A)
    assert revoked((members.home / "crl.pem").read_bytes()) == issued


def test_certificates_of_a_site_have_an_end_in_number(
    members: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None may be forgotten while it lives, or revoking the site would leave that one good."""
    monkeypatch.setattr(enrollment, "MOST_LIVE", 3)
    request = pb.RenewRequest(csr=make_csr(load_tls_key(members.state(A)), A))
    channel, stub = member_stub(members, A)
    with channel:
        for _ in range(2):
            stub.Renew(request)
        with pytest.raises(grpc.RpcError) as error:
            stub.Renew(request)
    assert code_of(error.value) == ("RESOURCE_EXHAUSTED", "too-many-certificates")
    assert len(Registry(members.home).sites()[A].certificates) == 3


def renewal_refused(members: Coordinator, name: str, csr: bytes) -> tuple[str, str]:
    channel, stub = member_stub(members, name)
    with channel, pytest.raises(grpc.RpcError) as error:
        stub.Renew(pb.RenewRequest(csr=csr), timeout=20)
    assert members.events[-1]["event"] == "renewal-refused"
    assert members.events[-1]["site"] == name
    return code_of(error.value)


def test_renewal_with_another_key_is_refused(members: Coordinator) -> None:
    assert renewal_refused(members, A, make_csr(make_key(), A)) == (DENIED, "another-key")


def test_the_certificate_of_another_site_cannot_be_renewed(members: Coordinator) -> None:
    """Not by its name in the request, which counts for nothing, nor by its key."""
    theirs = load_tls_key(members.state(B))
    assert renewal_refused(members, A, make_csr(theirs, B)) == (DENIED, "another-key")
    own = load_tls_key(members.state(A))
    channel, stub = member_stub(members, A)
    with channel:
        reply = stub.Renew(pb.RenewRequest(csr=make_csr(own, B)))
    ca = (members.home / "ca.pem").read_bytes()
    assert site_of(reply.certificate, ca, own.public_key(), datetime.now(UTC)) == A


def test_a_request_to_renew_that_is_none(members: Coordinator) -> None:
    assert renewal_refused(members, A, b"x") == ("INVALID_ARGUMENT", "bad-request")


def test_a_revoked_site_gets_nothing_more(members: Coordinator) -> None:
    own = make_csr(load_tls_key(members.state(A)), A)
    revoke(members.home, A)
    assert renewal_refused(members, A, own) == (DENIED, "site-revoked")
    channel, stub = member_stub(members, A)
    with channel:
        for method, request in (
            (stub.GetRoster, pb.RosterRequest()),
            (stub.ReportHead, pb.HeadRequest(head="0" * 64)),
        ):
            with pytest.raises(grpc.RpcError) as error:
                method(request)
            assert code_of(error.value) == (DENIED, "site-revoked")
    assert Registry(members.home).sites()[A].audit_head == ""


def test_without_a_certificate_nobody_is_a_member(members: Coordinator) -> None:
    with members.stranger() as channel, pytest.raises(grpc.RpcError) as error:
        services.MembershipStub(channel).GetRoster(pb.RosterRequest(), timeout=20)
    assert error.value.code() is not grpc.StatusCode.OK
    endpoint, own = f"127.0.0.1:{members.member_port}", make_key()
    ca = (members.home / "ca.pem").read_bytes()
    certificate = (members.state(A) / "certificate.pem").read_bytes()
    for pair in ((None, None), (key_to_pem(own), certificate)):  # and one without its key
        with open_channel(endpoint, ca, *pair) as channel, pytest.raises(grpc.RpcError) as error:
            services.MembershipStub(channel).GetRoster(pb.RosterRequest(), timeout=20)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_head_of_a_sites_audit_is_kept(members: Coordinator) -> None:
    channel, stub = member_stub(members, A)
    with channel:
        stub.ReportHead(pb.HeadRequest(run="r\n1", round=3, lines=70, head="ab" * 32))
        with pytest.raises(grpc.RpcError) as error:
            stub.ReportHead(pb.HeadRequest(run="r1", round=4, lines=71, head="AB" * 32))
    assert code_of(error.value) == ("INVALID_ARGUMENT", "bad-request")
    site = Registry(members.home).sites()[A]
    assert (site.audit_lines, site.audit_head) == (70, "ab" * 32)
    facts = {"site": A, "run": "r1", "round": 3, "lines": 70, "head": "ab" * 32}
    assert members.events[-1] == {"event": "audit-head", **facts}


def test_the_clock(members: Coordinator) -> None:
    channel, stub = member_stub(members, A)
    with channel:
        said = stub.GetTime(pb.TimeRequest()).unix_seconds
    assert abs(said - datetime.now(UTC).timestamp()) < 5
