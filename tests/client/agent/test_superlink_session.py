"""A site's session: what it makes of every answer; a message arrives whole or not at all."""

import ssl
import time

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_superlink import NODE, RUN, FakeSuperLink
from support.matrix import tries

from fedgraft.client.agent import superlink_session as module
from fedgraft.client.agent.superlink_session import (
    MessageExpired,
    Refused,
    SessionAlive,
    SessionError,
    SessionUnknown,
    SuperLinkSession,
    Unreachable,
)
from fedgraft.common.federation.certificates import make_key, public_pem

KEY = make_key()
SECRET = "secret-5d1c"
MANY = settings(max_examples=tries(25), suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeSuperLink:
    made = FakeSuperLink()
    made.install(monkeypatch)
    return made


def content_of(values: list[float], word: str = "w") -> RecordDict:
    array = Array(np.asarray(values, np.float32))
    return RecordDict(
        {"payload": ConfigRecord({"word": word}), "arrays": ArrayRecord({"a": array})}
    )


def opened() -> SuperLinkSession:
    return SuperLinkSession("link:1", None, KEY)


def test_a_session_begins_and_ends(link: FakeSuperLink) -> None:
    with opened() as fleet:
        assert fleet.node_id == NODE
        assert fleet.receive() is None
    assert link.asked == {"activate-node": 1, "pull-messages": 1, "deactivate-node": 1}


def test_every_request_is_signed_with_the_key_that_was_enrolled(link: FakeSuperLink) -> None:
    import base64

    with opened() as fleet:
        fleet.receive()
    for headers in link.headers:
        assert base64.b64decode(headers["flwr-public-key"]) == public_pem(KEY.public_key())
        assert "flwr-signature" in headers


@settings(MANY, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), max_size=20), word=st.text(max_size=9))
def test_a_message_and_its_reply_are_what_was_sent(
    link: FakeSuperLink, values: list[float], word: str
) -> None:
    with opened() as fleet:
        sent = link.send(content_of(values, word), "train")
        task = fleet.receive()
        assert task is not None
        assert task.run_id == RUN
        assert task.message.metadata.message_id == sent.object_id
        assert task.message.content == sent.content
        fleet.reply(task, Message(content_of(values[::-1], word), reply_to=task.message), 0.5)
    assert link.confirmed[-1] == sent.object_id
    reply = link.replies[-1]
    assert reply.content == content_of(values[::-1], word)
    assert reply.metadata.reply_to_message_id == sent.object_id
    assert reply.metadata.run_id == RUN


def test_parts_that_are_not_there_yet_are_waited_for_briefly(link: FakeSuperLink) -> None:
    link.unavailable = 3
    link.send(content_of([1.0]), "train")
    with opened() as fleet:
        began = time.monotonic()
        assert fleet.receive() is not None
        assert time.monotonic() - began < 0.9  # Flower's own first wait is a second


@pytest.mark.parametrize("fault", ["lost", "damaged"])
def test_a_message_that_is_not_whole_is_left_out(
    link: FakeSuperLink,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pull = link._pull_object
    if fault == "lost":
        link.lost = True
    else:

        def damaged(request: object) -> object:
            answer = pull(request)
            answer.object_content = SECRET.encode()
            return answer

        monkeypatch.setattr(link, "_pull_object", damaged)
    with opened() as fleet:
        link.send(content_of([1.0]), "train")
        with pytest.raises(MessageExpired):
            fleet.receive()
        link.lost = False
        monkeypatch.setattr(link, "_pull_object", pull)
        link.send(content_of([2.0]), "train")
        assert fleet.receive() is not None  # the session goes on
    assert ("is not whole" in caplog.text) is (fault == "damaged")
    assert SECRET not in caplog.text


def test_a_reply_that_is_no_longer_wanted_is_lost(link: FakeSuperLink) -> None:
    with opened() as fleet:
        link.send(content_of([1.0]), "train")
        task = fleet.receive()
        assert task is not None
        link.stores = False
        with pytest.raises(MessageExpired):
            fleet.reply(task, Message(content_of([2.0]), reply_to=task.message), 0.1)
        assert fleet.receive() is None  # the session goes on
    assert link.replies == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (412, SessionAlive),
        (401, SessionUnknown),
        (404, SessionUnknown),
        (403, Refused),
        (400, Refused),
        (302, Unreachable),
        (413, Unreachable),
        (429, Unreachable),
        (500, Unreachable),
        (502, Unreachable),
    ],
)
@pytest.mark.parametrize("call", ["activate-node", "pull-messages"])
def test_a_status_says_what_to_do(
    link: FakeSuperLink, status: int, kind: type[SessionError], call: str
) -> None:
    link.broken[call] = httpx.Response(status, text=SECRET)
    with pytest.raises(SessionError) as error, opened() as fleet:
        fleet.receive()
    assert type(error.value) is kind
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__  # no trace of what the other side said


def from_tls() -> httpx.ConnectError:
    error = httpx.ConnectError(SECRET)
    error.__cause__ = ssl.SSLError(SECRET)
    return error


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (httpx.ConnectError(SECRET), Unreachable),
        (httpx.ReadTimeout(SECRET), Unreachable),
        (httpx.RemoteProtocolError(SECRET), Unreachable),
        (httpx.TooManyRedirects(SECRET), Unreachable),
        (httpx.DecodingError(SECRET), Unreachable),
        (httpx.Response(200, text=f"<html>{SECRET}</html>"), Unreachable),
        (httpx.ConnectError(f"[SSL: TLSV1_ALERT_UNKNOWN_CA] {SECRET}"), Refused),
        (from_tls(), Refused),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, type) else value.__name__,
)
def test_a_fault_of_the_line_is_told_by_its_class(
    link: FakeSuperLink, fault: httpx.Response | Exception, kind: type[SessionError]
) -> None:
    link.broken["pull-messages"] = fault
    with pytest.raises(SessionError) as error, opened() as fleet:
        fleet.receive()
    assert type(error.value) is kind
    assert SECRET not in str(error.value)
    # the line is not what it was, so nobody waits for a goodbye to be answered
    assert link.asked["deactivate-node"] == 0


def test_a_coordinator_that_is_gone_at_the_end_is_no_error(link: FakeSuperLink) -> None:
    link.broken["deactivate-node"] = httpx.ConnectError("gone")
    with opened():
        pass
    assert link.asked["deactivate-node"] == 1


def until(happened: object, seconds: float = 5.0) -> None:
    stop = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < stop
        time.sleep(0.005)


def test_a_heartbeat_that_the_coordinator_does_not_know_ends_the_session(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    with pytest.raises(SessionUnknown), opened() as fleet:
        until(lambda: link.asked["send-node-heartbeat"] > 2)
        assert fleet.receive() is None
        link.alive = False
        until(lambda: fleet._lost)
        fleet.receive()


def test_a_heartbeat_without_an_answer_is_tried_again(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    link.broken["send-node-heartbeat"] = httpx.ReadTimeout("late")
    with opened() as fleet:
        until(lambda: link.asked["send-node-heartbeat"] > 2)
        assert fleet.receive() is None
