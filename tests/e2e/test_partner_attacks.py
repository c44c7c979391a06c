"""Strangers, and members who want more than they may: over the real port, each refused and noted.

site-00 is a process as partners run it; site-01 and site-02 are in the hands of the test.
"""

import http.client
import json
import os
import select
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from urllib.parse import unquote

import grpc
import httpx
import pytest
from e2e.partners import NGINX, Partners
from e2e.puppets import Puppet, answering
from flwr.app import RecordDict
from support.federations import digits_job, write_digits
from support.models import write_model

from fedgraft.client.agent.superlink_session import (
    ReceivedMessage,
    Refused,
    SessionError,
    SessionUnknown,
    SuperLinkSession,
)
from fedgraft.client.membership.credentials import load_tls_key, open_member_channel
from fedgraft.client.membership.identity import load_identity
from fedgraft.common.backbones.blob_store import BlobStore, make_manifest
from fedgraft.common.config.job import Job
from fedgraft.common.federation.audit_log import verify
from fedgraft.common.federation.certificates import make_csr
from fedgraft.common.messages.codec import Stage
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.messages.signatures import seal
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.server.runs.run_folder import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

PULL = "/v1/fleet/pull-messages"
LARGE = 400_000_000  # bytes
GROWTH = 40_000_000  # bytes that the coordinator's processes may grow by meanwhile


def small_job(folder: Path, *overrides: str) -> Job:
    options = ("rounds.min_sites=2", "rounds.deadline='60s'", *overrides)
    return digits_job(*write_digits(folder / "digits", 60, 30), *options)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("a")  # short: it holds sockets
    with Partners(folder, small_job(folder)) as running:
        running.join_all()
        running.start_sites(["site-00"])
        yield running


def noted(partners: Partners, who: str | None, status: int, path: str) -> bool:
    """Whether nginx notes, soon, that it refused this; ``who`` is None for a stranger."""
    wanted = {"site": f"CN={who}" if who else "", "status": status, "path": path}

    def there() -> bool:
        lines = map(json.loads, partners.read("coordinator/nginx/refused.log").splitlines())
        return any(wanted.items() <= line.items() for line in lines)

    partners.until(there, 5)
    return True


def post(partners: Partners, path: str, who: str) -> int:
    """The status of a POST by a member, which must be noted."""
    with httpx.Client(verify=partners.tls(who)) as client:
        status = client.post(f"https://{partners.endpoint}{path}", content=b"").status_code
    assert noted(partners, who, status, path)
    return status


# --- strangers, who have the CA's file and a way to the port


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/control/start-run", 404),
        ("/v1/runtime/acquire-task", 404),
        (PULL, 401),
        ("/v1/fleet/register-node", 403),
        ("/fedgraft.v1.Membership/GetRoster", 401),
        ("/fedgraft.v1.Backbones/GetManifest", 401),
        ("/fedgraft.v1.Operator/Submit", 404),
        ("/docs", 404),
        ("//v1/control/start-run", 404),
        ("/v1/fleet/../control/start-run", 404),
        ("/v1/fleet/%2e%2e/control/start-run", 404),
    ],
)
def test_a_stranger_gets_nowhere(partners: Partners, path: str, status: int) -> None:
    connection = http.client.HTTPSConnection(partners.endpoint, context=partners.tls(None))
    connection.request("POST", path, b"")  # not httpx, which would tidy the path
    assert connection.getresponse().status == status
    assert noted(partners, None, status, os.path.normpath(unquote(path.replace("//", "/"))))


def flood(partners: Partners, who: str | None, *, chunked: bool) -> tuple[int, int]:
    """Post 400 MB until an answer comes: its status, and the bytes that were sent by then."""
    context = partners.tls(who)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # 1.3 has more to read than the answer
    connection = http.client.HTTPSConnection(partners.endpoint, context=context)
    connection.putrequest("POST", PULL)
    kind = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(LARGE))
    connection.putheader(*kind)
    if who:
        connection.putheader("flwr-public-key", Puppet(partners, who).public)
    connection.endheaders()
    sent, block = 0, bytes(1 << 20)
    framed = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
    while sent < LARGE and not select.select([connection.sock], [], [], 0)[0]:
        with suppress(ssl.SSLEOFError, ConnectionError):
            connection.sock.sendall(framed)
        sent += len(block)
    return connection.getresponse().status, sent


def memory(partners: Partners) -> int:
    """Resident bytes of the SuperLink, and of nginx with its workers."""
    pids = {str(each["pid"]) for each in partners.status()["processes"].values()}
    total = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            facts = dict(line.split(":", 1) for line in path.read_text().splitlines())
            if {path.parent.name, facts["PPid"].strip()} & pids:
                total += int(facts.get("VmRSS", "0 kB").split()[0]) * 1024
    return total


@pytest.mark.parametrize(
    ("who", "chunked", "status"),
    [(None, False, 413), (None, True, 401), ("site-01", False, 413), ("site-01", True, 413)],
)
def test_400_megabytes_end_at_the_front(
    partners: Partners, who: str | None, chunked: bool, status: int
) -> None:
    before = memory(partners)
    code, sent = flood(partners, who, chunked=chunked)
    assert code == status
    assert sent < LARGE / 4
    assert memory(partners) - before < GROWTH
    assert noted(partners, who, status, PULL)


def test_a_kit_is_good_once(partners: Partners, tmp_path: Path) -> None:
    kit = str(partners.kits / "site-00.kit")
    tell = ("--fingerprint", partners.fingerprint, "--site", str(tmp_path / "site.toml"))
    done = partners.call("site", "join", kit, *tell, check=False)
    assert done.returncode == 1
    assert "token-used" in done.stderr
    assert not (tmp_path / "state" / "membership.json").exists()
    events = [event for event in partners.events() if event["event"] == "enrolment-refused"]
    assert (events[-1]["site"], events[-1]["code"]) == ("site-00", "token-used")


# --- members at the port


def test_a_member_cannot_submit_or_register(partners: Partners) -> None:
    assert post(partners, "/v1/control/start-run", "site-01") == 404
    assert post(partners, "/v1/runtime/acquire-task", "site-01") == 404
    assert post(partners, "/v1/fleet/register-node", "site-01") == 403


def test_the_operators_service_is_not_on_the_public_port(partners: Partners) -> None:
    state = partners.folder / "site-01" / "state"
    files = [(state / name).read_bytes() for name in ("ca.pem", "tls.key", "certificate.pem")]
    with open_channel(partners.endpoint, *files) as channel, pytest.raises(grpc.RpcError) as error:
        services.OperatorStub(channel).Submit(pb.SubmitRequest(job=""), timeout=10)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert noted(partners, "site-01", 404, "/fedgraft.v1.Operator/Submit")


def test_a_certificate_goes_with_its_own_node_key_alone(partners: Partners) -> None:
    key = load_tls_key(partners.folder / "site-01" / "state")
    with (
        pytest.raises(Refused, match="403"),
        SuperLinkSession(partners.endpoint, partners.tls("site-02"), key),
    ):
        pass
    assert noted(partners, "site-02", 403, "/v1/fleet/activate-node")


def test_a_session_is_for_its_own_messages_alone(partners: Partners) -> None:
    with Puppet(partners, "site-01") as one, Puppet(partners, "site-02") as two:
        own, two.fleet.node = two.fleet.node, one.fleet.node
        with pytest.raises(SessionUnknown, match="401"):
            two.fleet.receive()
        two.fleet.node = own  # to say goodbye
    assert noted(partners, "site-02", 401, PULL)


def test_no_name_but_the_certificates_counts(partners: Partners) -> None:
    """Membership is told who asks by nginx, whatever the caller says."""
    two = Puppet(partners, "site-02")
    liar = (("x-site", "site-01"),)
    with open_member_channel(two.state, partners.endpoint) as channel:
        stub = services.MembershipStub(channel)
        stub.ReportHead(pb.HeadRequest(head="0" * 64), metadata=liar, timeout=10)
        csr = make_csr(load_tls_key(partners.folder / "site-01" / "state"), "site-01")
        with pytest.raises(grpc.RpcError) as error:
            stub.Renew(pb.RenewRequest(csr=csr), metadata=liar, timeout=10)
    assert error.value.details() == "another-key"
    heads = [event["site"] for event in partners.events() if event["event"] == "audit-head"]
    refusals = [event for event in partners.events() if event["event"] == "renewal-refused"]
    assert heads[-1] == "site-02"
    assert (refusals[-1]["site"], refusals[-1]["code"]) == ("site-02", "another-key")


# --- replies: what lies between a site and the rounds delivers whatever names a request


def sealed(
    puppet: Puppet, task: ReceivedMessage, content: RecordDict, *, site: str = ""
) -> RecordDict:
    """``content`` under the seal of ``puppet``, in the name of ``site`` if not in its own."""
    content = deepcopy(content)
    request = task.message.metadata.message_id
    sign = load_identity(puppet.state).sign
    seal(content, site=site or puppet.name, request=request, sign=sign)
    return content


def test_a_reply_counts_if_the_site_asked_signed_it_for_this_request(partners: Partners) -> None:
    """One honest round, then another lie in each; site-01's requests are known to site-02."""
    run = partners.submit(small_job(partners.folder, "rounds.count=7", "data.validation=0"))
    one, two = Puppet(partners, "site-01"), Puppet(partners, "site-02")
    said: list[RecordDict] = []

    def attack(puppet: Puppet, task: ReceivedMessage) -> bool:
        if puppet is not one or task.message.metadata.message_type != Stage.TRAIN:
            return False
        honest = one.answer(task).content
        said.append(deepcopy(honest))
        bare = bare_of(honest)
        sender, content = {
            1: (one, honest),
            2: (two, sealed(two, task, bare, site="site-01")),  # in site-01's name
            3: (two, sealed(two, task, bare)),  # a good seal, of another site
            4: (two, bare),
            5: (one, said[0]),  # what it said in the first round, once more
            6: (one, sealed(one, task, bare_of(said[0]))),  # the same, signed anew
            7: (two, honest),  # site-02 as a courier: authentic, so harmless
        }[len(said)]
        sender.send(task, content)
        return True

    with one, two:
        answering((one, two), lambda: partners.state(run) == "finished", attack)
    dropped = [line["dropped"] for line in partners.rounds(run)]
    bad = [{"site": "site-01", "reason": "bad-seal"}]
    stale = [{"site": "site-01", "reason": "wrong-round"}]
    assert dropped == [[], bad, bad, bad, bad, stale, []]
    assert [line["sites"] for line in partners.rounds(run)] == [3, 2, 2, 2, 2, 2, 3]
    events = Run(partners.home / "runs" / run).events()
    told = [(one["round"], one["reason"]) for one in events if one["event"] == "dropped"]
    assert told == [*((number, "bad-seal") for number in range(2, 6)), (6, "wrong-round")]
    audit = [event for event in partners.events() if event["event"] == "reply-refused"]
    assert [(one["site"], one["round"], one["code"]) for one in audit] == [
        ("site-01", *each) for each in told
    ]
    verify(partners.home / "audit.jsonl")


def bare_of(content: RecordDict) -> RecordDict:
    """A reply without its seal."""
    found = deepcopy(content)
    record = found.config_records["payload"]
    for key in [key for key in record if key.startswith("seal.")]:
        del record[key]
    return found


# --- a site that was shut out


def test_a_revoked_certificate_ends_open_sessions(partners: Partners, tmp_path: Path) -> None:
    """A session at Flower's and a stream of chunks, taken slowly; the site may come back after."""
    folder = write_model(tmp_path / "large", chunks=32)
    manifest = make_manifest(folder, source="path:large")
    BlobStore(partners.home / "backbones").import_folder(folder, manifest)
    two, ended = Puppet(partners, "site-02"), dict[str, tuple[float, object]]()

    def poll() -> None:
        try:
            while True:
                two.fleet.receive()
                time.sleep(0.2)
        except SessionError as error:
            ended["session"] = time.monotonic(), type(error)

    def stream(channel: grpc.Channel) -> None:
        request = pb.ChunksRequest(digest=manifest.digest, indexes=range(len(manifest.chunks)))
        try:
            for _ in services.BackbonesStub(channel).GetChunks(request):
                time.sleep(1)
        except grpc.RpcError as error:
            ended["stream"] = time.monotonic(), error.code()

    two.fleet.__enter__()
    with open_member_channel(two.state, partners.endpoint) as channel:
        threads = [
            threading.Thread(target=poll),
            threading.Thread(target=stream, args=(channel,)),
        ]
        for thread in threads:
            thread.start()
        time.sleep(3)
        assert not ended
        partners.call("provision", "revoke", "site-02", "--home", str(partners.home))
        revoked = time.monotonic()
        for thread in threads:
            thread.join(90)
        print({key: (at - revoked, what) for key, (at, what) in ended.items()})
        assert {key for key, (at, _) in ended.items() if at - revoked < 60} == {"session", "stream"}
        with pytest.raises(grpc.RpcError):
            services.MembershipStub(channel).GetRoster(pb.RosterRequest(), timeout=10)
    with (
        pytest.raises(Refused),
        SuperLinkSession(partners.endpoint, two.agent.tls(), two.agent.key),
    ):
        pass
    assert noted(partners, "site-02", 400, "/v1/fleet/activate-node")
    gone = {"event": "unregistered", "site": "site-02"}.items()
    assert any(gone <= event.items() for event in partners.events())  # others may come after it
    home, kits = str(partners.home), str(partners.kits)
    partners.call("provision", "renew", "site-02", "--home", home, "-o", kits)
    (two.state / "membership.json").unlink()
    partners.join("site-02")
    partners.until(lambda: comes_in(partners, "site-02"))
    run = partners.submit(small_job(partners.folder, "rounds.count=1", "data.validation=0"))
    with Puppet(partners, "site-02") as two:
        answering((two,), lambda: partners.state(run) == "finished")
    assert partners.rounds(run)[0]["sites"] == 2


def comes_in(partners: Partners, name: str) -> bool:
    with suppress(SessionError), Puppet(partners, name):
        return True
    return False
