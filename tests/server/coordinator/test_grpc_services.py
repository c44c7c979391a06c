"""The sockets: only for this user, and of a failure nothing but that it failed is on the wire."""

import json
import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.memberships import NAMES, code_of, write_plan

from fedgraft.common.errors import FedgraftError, InputError, TooFewSites
from fedgraft.common.federation.certificates import make_csr, make_key
from fedgraft.common.federation.kit import enrolment_statement
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as rpc
from fedgraft.common.secagg.keys import Identity
from fedgraft.server.coordinator.grpc_services import (
    LONGEST,
    OperatorService,
    serve_operators,
    serve_sites,
)
from fedgraft.server.enrollment.provision import found

SECRET = "secret-5d1c"
NAMED = (("x-site", NAMES[0]),)
FAULTS = (
    RuntimeError(SECRET),
    OSError(2, SECRET, SECRET),
    KeyError(SECRET),
    AssertionError(SECRET),
)
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
# Every call that a site can make, and what of ours it comes to first.
CALLS: dict[str, tuple[Callable[[grpc.Channel], Any], str]] = {
    "Enrol": (
        lambda channel: rpc.EnrolmentStub(channel).Enrol(enrolment()),
        "fedgraft.server.enrollment.registry.Registry.sites",
    ),
    "Renew": (
        lambda channel: rpc.MembershipStub(channel).Renew(pb.RenewRequest(), metadata=NAMED),
        "fedgraft.server.enrollment.registry.Registry.sites",
    ),
    "GetRoster": (
        lambda channel: rpc.MembershipStub(channel).GetRoster(pb.RosterRequest(), metadata=NAMED),
        "fedgraft.server.enrollment.registry.Registry.sites",
    ),
    "ReportHead": (
        lambda channel: rpc.MembershipStub(channel).ReportHead(
            pb.HeadRequest(head="ab" * 32), metadata=NAMED
        ),
        "fedgraft.server.enrollment.registry.Registry.sites",
    ),
    "GetTime": (
        lambda channel: rpc.MembershipStub(channel).GetTime(pb.TimeRequest(), metadata=NAMED),
        "fedgraft.server.enrollment.service.time",
    ),
    "GetManifest": (
        lambda channel: rpc.BackbonesStub(channel).GetManifest(pb.ManifestRequest(digest="0")),
        "fedgraft.common.backbones.blob_store.BlobStore.manifest",
    ),
    "GetChunks": (
        lambda channel: list(rpc.BackbonesStub(channel).GetChunks(pb.ChunksRequest(digest="0"))),
        "fedgraft.common.backbones.blob_store.BlobStore.manifest",
    ),
}


def enrolment() -> Any:
    """A request to join that is right but for its token."""
    key, identity = make_key(), Identity.generate()
    csr = make_csr(key, NAMES[0])
    proof = identity.sign(enrolment_statement(NAMES[0], csr))
    return pb.EnrolRequest(site=NAMES[0], token="t", csr=csr, identity=identity.public, proof=proof)


each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s")  # short: it holds sockets
    found(write_plan(folder), folder / "c", folder / "kits")
    (folder / "c" / "run").mkdir()
    return folder / "c"


class Told(list[dict[str, Any]]):
    """Events, or a fault in place of each."""

    fault: Exception | None = None

    def __call__(self, kind: str, **facts: Any) -> None:
        if self.fault:
            raise self.fault
        self.append({"event": kind, **facts})


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def sites(home: Path, told: Told) -> Iterator[grpc.Channel]:
    server = serve_sites(home, told)
    with open_channel(f"unix:{home}/run/services.sock") as channel:
        yield channel
    server.stop(0).wait()


def refusal(call: Callable[[], object]) -> tuple[str, str, str]:
    """Status, details, and all that came with the answer."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    failed: Any = error.value
    everything = f"{failed!r} {failed.trailing_metadata()} {failed.debug_error_string()}"
    return *code_of(failed), everything


class Broken:
    """Raises ``fault`` when it is called, or anything of it is asked for."""

    def __init__(self, fault: Exception) -> None:
        self._fault = fault

    def __call__(self, *_: object, **__: object) -> Any:
        raise self._fault

    def __getattr__(self, name: str) -> Any:
        raise self._fault


# --- failures


@each_fault
@each_call
def test_a_call_that_fails_says_nothing_of_why(
    sites: grpc.Channel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    fault: Exception,
) -> None:
    call, place = CALLS[name]
    monkeypatch.setattr(place, Broken(fault))
    status, details, everything = refusal(lambda: call(sites))
    assert (status, details) == ("INTERNAL", "fault")
    assert SECRET not in everything + caplog.text


@each_call
def test_every_call_is_among_those_that_are_tried(name: str) -> None:
    served = {
        method.name
        for service in ("Enrolment", "Membership", "Backbones")
        for method in pb.DESCRIPTOR.services_by_name[service].methods
    }
    assert name in served
    assert served == set(CALLS)


def test_a_refusal_that_cannot_be_recorded_says_nothing_either(
    sites: grpc.Channel, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    told.fault = OSError(28, SECRET)
    status, details, everything = refusal(lambda: CALLS["Enrol"][0](sites))
    assert (status, details) == ("INTERNAL", "fault")
    assert SECRET not in everything + caplog.text


def test_what_is_refused_on_purpose_keeps_its_code(sites: grpc.Channel, told: Told) -> None:
    assert refusal(lambda: CALLS["GetManifest"][0](sites))[:2] == (
        "NOT_FOUND",
        "no backbone with this digest",
    )
    assert refusal(lambda: CALLS["GetChunks"][0](sites))[0] == "NOT_FOUND"
    assert refusal(lambda: CALLS["GetRoster"][0](sites))[:2] == (
        "PERMISSION_DENIED",
        "site-revoked",
    )
    assert refusal(lambda: CALLS["Enrol"][0](sites))[:2] == ("PERMISSION_DENIED", "token-wrong")
    assert [event["code"] for event in told] == ["token-wrong"]


def test_the_log_has_the_class(
    sites: grpc.Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(CALLS["GetManifest"][1], Broken(ZeroDivisionError(SECRET)))
    refusal(lambda: CALLS["GetManifest"][0](sites))
    assert "ZeroDivisionError" in caplog.text


def test_an_unknown_call_is_refused_as_before(sites: grpc.Channel) -> None:
    call: Any = sites.unary_unary("/fedgraft.v1.Membership/Nothing")
    assert refusal(lambda: call(b""))[0] == "UNIMPLEMENTED"


# --- operators


def operate(home: Path, fault: Exception | None = None) -> grpc.Server:
    def answer(*arguments: str) -> Any:
        if fault:
            raise fault
        return "run-1" if arguments else {"sites": []}

    return serve_operators(home, OperatorService(answer, answer, answer))


def ask(home: Path, call: Callable[[rpc.OperatorStub], Any]) -> Any:
    with open_channel(f"unix:{home}/run/operator.sock") as channel:
        return call(rpc.OperatorStub(channel))


ASKED: tuple[Callable[[rpc.OperatorStub], Any], ...] = (
    lambda stub: stub.Submit(pb.SubmitRequest(job="j")),
    lambda stub: stub.Status(pb.StatusRequest()),
    lambda stub: stub.Stop(pb.StopRequest(run="r")),
)
each_question = pytest.mark.parametrize("question", ASKED, ids=["submit", "status", "stop"])


def test_an_operator_is_answered(home: Path) -> None:
    server = operate(home)
    assert ask(home, ASKED[0]).run == "run-1"
    assert json.loads(ask(home, ASKED[1]).status) == {"sites": []}
    ask(home, ASKED[2])
    server.stop(0)


@each_question
def test_an_operator_reads_our_words(home: Path, question: Callable[..., Any]) -> None:
    server = operate(home, TooFewSites("not so", hint="but so"))
    status, details, _ = refusal(lambda: ask(home, question))
    assert status == "FAILED_PRECONDITION"
    assert json.loads(details) == {"error": "not so", "hint": "but so", "code": 4}
    server.stop(0)


@each_question
@each_fault
def test_and_no_others(
    home: Path,
    question: Callable[..., Any],
    fault: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = operate(home, fault)
    status, details, everything = refusal(lambda: ask(home, question))
    assert (status, details) == ("INTERNAL", "fault")
    assert SECRET not in everything + caplog.text
    server.stop(0)


def test_a_fault_is_not_taken_for_a_coordinator_that_is_not_there(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.commands import command

    server = operate(home, RuntimeError(SECRET))
    code, out, err = command(capsys, "coordinator", "status", "--home", str(home))
    server.stop(0).wait()
    assert code == 1
    assert "could not do it" in err
    assert SECRET not in out + err
    code, _, err = command(capsys, "coordinator", "status", "--home", str(home))
    assert code == 1
    assert "no coordinator runs" in err


# --- sockets


def test_sockets_are_this_users_alone_and_may_lie_there_from_before(home: Path) -> None:
    for _ in range(2):
        server = operate(home)
        path = home / "run" / "operator.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert ask(home, ASKED[0]).run == "run-1"
        server.stop(0).wait()
        path.touch()  # as after kill -9


def test_a_path_that_is_too_long_is_told_before_anything_listens(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * LONGEST)
    (deep / "run").mkdir(parents=True)
    with pytest.raises(InputError, match="too long for a socket") as error:
        serve_operators(deep, OperatorService(str, dict, print))
    assert "shorter path" in error.value.hint
    assert isinstance(error.value, FedgraftError)
