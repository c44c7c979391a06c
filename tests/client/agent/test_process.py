"""The site as a process: it answers what comes, survives what goes wrong, and tells no text."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from support.fake_superlink import NODE, FakeSuperLink

from fedgraft.client.agent import process as module
from fedgraft.client.agent.process import RUNS, Agent, Chores, PollInterval
from fedgraft.client.agent.superlink_session import (
    ReceivedMessage,
    Refused,
    SessionAlive,
    SessionUnknown,
    Unreachable,
)
from fedgraft.common.federation.certificates import make_key
from fedgraft.common.messages.signatures import unseal
from fedgraft.common.secagg.keys import Identity

KEY = make_key()
SECRET = "secret-5d1c"
QUICK = PollInterval(brisk=0.001, idle=0.001, during=0.0)


@dataclass
class Clock:
    """``time`` as the agent sees it: sleeping costs nothing and is noted."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)
    limit: int = 2000

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        assert len(self.slept) < self.limit, "it never ends"


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeSuperLink:
    made = FakeSuperLink()
    made.install(monkeypatch)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def make_agent(**more: Any) -> Agent:
    facts: dict[str, Any] = {
        "site": "amy",
        "endpoint": "link:1",
        "key": KEY,
        "sign": lambda said: b"signed:" + said[:4],
        "node_config": {"site": "/somewhere/site.toml"},
        "tls": lambda: None,
        "poll_interval": QUICK,
    }
    return Agent(**(facts | more))


class Noted(Chores):
    """What the agent tells its chores, in order; ``idle`` says whether it renewed something."""

    def __init__(self, idle: Callable[[], bool] = lambda: False) -> None:
        self.said: list[str] = []
        self._idle = idle

    def came(self) -> None:
        self.said.append("came")

    def answered(self) -> None:
        self.said.append("answered")

    def idle(self) -> bool:
        self.said.append("idle")
        return self._idle()

    def close(self) -> None:
        self.said.append("close")


def content_of(word: str = "w") -> RecordDict:
    return RecordDict({"payload": ConfigRecord({"word": word})})


def answering(monkeypatch: pytest.MonkeyPatch, handle: Callable[[Message, Context], Any]) -> None:
    """Have the installed app answer with ``handle``."""
    monkeypatch.setattr(module, "app", handle)


@contextmanager
def running(agent: Agent) -> Iterator[None]:
    """The agent at work in a thread, stopped at the end."""
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        agent.stopping = True
        thread.join(5)
        assert not thread.is_alive()


def until(happened: Callable[[], object], seconds: float = 5.0) -> None:
    stop = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < stop
        time.sleep(0.005)


# --- one message


def task_of(link: FakeSuperLink, run: int = 5) -> ReceivedMessage:
    return ReceivedMessage(link.send(content_of(), "train"), run)


def test_the_reply_is_sealed_by_this_site_for_this_request(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda asked, context: Message(content_of("done"), reply_to=asked))
    identity = Identity.generate()
    agent, task = make_agent(sign=identity.sign), task_of(link)
    reply = agent.answer(task, NODE)
    request = task.message.metadata.message_id
    keys = {"amy": identity.public}
    assert unseal(reply.content, request=request, key_of=keys.get) == "amy"
    assert reply.content == content_of("done")


@pytest.mark.parametrize("fault", [RuntimeError(SECRET), KeyError(SECRET), AssertionError(SECRET)])
def test_of_an_error_the_coordinator_gets_the_class_alone(
    link: FakeSuperLink,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
) -> None:
    def breaks(asked: Message, context: Context) -> Message:
        raise fault

    answering(monkeypatch, breaks)
    reply = make_agent().answer(task_of(link), NODE)
    assert reply.has_error()
    assert reply.error.reason == type(fault).__name__
    assert SECRET not in str(reply.error) + caplog.text


def test_what_cannot_be_signed_does_not_leave(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda asked, context: Message(content_of(SECRET), reply_to=asked))

    def sign(said: bytes) -> bytes:
        raise OSError(SECRET)

    reply = make_agent(sign=sign).answer(task_of(link), NODE)
    assert not reply.has_content()
    assert reply.error.reason == "OSError"


def test_each_run_has_a_context_and_only_the_newest_are_kept(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Context] = []

    def answer(asked: Message, context: Context) -> Message:
        seen.append(context)
        return Message(content_of(), reply_to=asked)

    answering(monkeypatch, answer)
    agent = make_agent()
    for run in (1, 2, 1):
        agent.answer(task_of(link, run), NODE)
    assert seen[0] is seen[2]
    assert seen[0] is not seen[1]
    assert seen[0].node_config == {"site": "/somewhere/site.toml"}
    assert (seen[1].run_id, seen[1].node_id) == (2, NODE)
    for run in range(3, 3 + RUNS):
        agent.answer(task_of(link, run), NODE)
    assert sorted(agent.contexts) == list(range(3, 3 + RUNS))


# --- the loop


def test_messages_are_answered_until_it_is_stopped(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda asked, context: Message(content_of("done"), reply_to=asked))
    sent = [link.send(content_of(str(number)), "train") for number in range(3)]
    with running(make_agent()):
        until(lambda: len(link.replies) == 3)
    replied = [reply.metadata.reply_to_message_id for reply in link.replies]
    assert replied == [message.object_id for message in sent]
    assert link.asked["activate-node"] == link.asked["deactivate-node"] == 1


def test_a_message_that_breaks_everything_stops_nothing(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(asked: Message, context: Context) -> Message:
        if asked.content["payload"]["word"] == "bad":
            raise MemoryError(SECRET)
        return Message(content_of("done"), reply_to=asked)

    answering(monkeypatch, answer)
    link.send(content_of("bad"), "train")
    link.send(content_of("good"), "train")
    with running(make_agent()):
        until(lambda: len(link.replies) == 2)
    assert link.replies[0].error.reason == "MemoryError"
    assert link.replies[1].has_content()


def test_a_message_that_nobody_waits_for_stops_nothing(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda asked, context: Message(content_of("done"), reply_to=asked))
    link.lost = True
    link.send(content_of("gone"), "train")
    with running(make_agent()):
        until(lambda: link.asked["pull-object"] and link.asked["pull-messages"] > 2)
        link.lost = False
        link.send(content_of("here"), "train")
        until(lambda: link.replies)
    assert link.asked["activate-node"] == 1


def test_a_lost_line_is_tried_again_with_another_session(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", {})
    monkeypatch.setattr(module, "SOON", 0.001)
    answering(monkeypatch, lambda asked, context: Message(content_of("done"), reply_to=asked))
    link.broken["pull-messages"] = httpx.ConnectError(SECRET)
    with running(make_agent()):
        until(lambda: link.asked["activate-node"] > 2)
        del link.broken["pull-messages"]
        link.send(content_of(), "train")
        until(lambda: link.replies)


def test_a_renewed_certificate_begins_another_session(link: FakeSuperLink) -> None:
    renewed = iter([False, True, False])
    made: list[None] = []
    chores = Noted(lambda: next(renewed, False))
    agent = make_agent(chores=chores, tls=lambda: made.append(None))
    with running(agent):
        until(lambda: link.asked["activate-node"] == 2)
        until(lambda: link.asked["pull-messages"] > 5)
    assert len(made) == 2  # TLS with the certificate as it is then
    assert link.asked["activate-node"] == link.asked["deactivate-node"] == 2


def test_chores_know_what_the_site_is_at(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda asked, context: Message(content_of("done"), reply_to=asked))
    chores = Noted()
    for _ in range(3):
        link.send(content_of(), "train")
    with running(make_agent(chores=chores)):
        until(lambda: "idle" in chores.said)
    assert chores.said[:7] == [*["came", "answered"] * 3, "idle"]
    assert chores.said[-1] == "close"


def test_chores_end_however_the_site_does(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> None:
        raise FileNotFoundError

    chores = Noted()
    with pytest.raises(FileNotFoundError):
        make_agent(chores=chores, tls=breaks).run()
    assert chores.said == ["close"]


# --- how long it waits


@given(since=st.floats(0, 1e6), during=st.floats(0, 1e6))
def test_the_pace_is_brisk_for_a_while_after_a_message(since: float, during: float) -> None:
    poll_interval = PollInterval(brisk=1.0, idle=2.0, during=during)
    assert poll_interval.pause(since) == (1.0 if since < during else 2.0)


def test_after_a_message_it_asks_briskly_and_idle_without(
    link: FakeSuperLink, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    answering(monkeypatch, lambda asked, context: Message(content_of("done"), reply_to=asked))
    agent = make_agent(poll_interval=PollInterval(brisk=0.25, idle=4.0, during=1.0))
    empty = 0

    def idle() -> bool:
        nonlocal empty
        empty += 1
        if empty == 2:
            link.send(content_of(), "train")
        agent.stopping = empty == 9
        return False

    agent.chores = Noted(idle)
    agent.run()
    waited = [0.5] * 16 + [0.25] * 4 + [0.5] * 8 + [0.5] * 8
    assert clock.slept == waited  # two idle ones, four brisk ones within a second, idle again


@pytest.mark.parametrize(
    ("answer", "least", "most", "said"),
    [
        (httpx.Response(412), 3.75, 6.25, "still alive"),
        (httpx.Response(403, text=SECRET), 45.0, 75.0, "fedgraft site doctor"),
        (httpx.Response(404, text=SECRET), 0.75, 1.25, ""),
        (httpx.Response(502, text=SECRET), 0.75, 1.25, ""),
    ],
)
def test_how_long_it_waits_and_what_it_says(
    link: FakeSuperLink,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    answer: httpx.Response,
    least: float,
    most: float,
    said: str,
) -> None:
    caplog.set_level(logging.INFO)
    link.broken["activate-node"] = answer
    agent = make_agent()

    def once(seconds: float) -> None:
        clock.slept.append(seconds)
        agent.stopping = True

    agent._wait = once  # type: ignore[method-assign]
    agent.run()
    (waited,) = clock.slept
    assert least <= waited <= most
    assert said in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("kind", [Unreachable, SessionUnknown, SessionAlive, Refused])
def test_it_never_waits_longer_than_a_person_would(
    kind: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    waits = [module._explain(kind("x"), failures, "link:1") for failures in range(1, 40)]
    longest = {Unreachable: 12.5, SessionUnknown: 1.25, SessionAlive: 6.25, Refused: 75.0}[kind]
    assert all(0 < wait <= longest for wait in waits)
    assert len(set(waits)) > 10  # sites do not come all at once


def test_it_stops_within_a_second_while_it_waits(link: FakeSuperLink) -> None:
    link.broken["activate-node"] = httpx.Response(403)  # it waits for a minute
    agent = make_agent()
    with running(agent):
        until(lambda: link.asked["activate-node"] == 1)
        began = time.monotonic()
    assert time.monotonic() - began < 1.0


def test_tls_is_with_the_federations_ca_alone(tmp_path: Any) -> None:
    from support.clinic import Authority, Site

    site = Site(tmp_path, Authority(), "localhost:1")
    names = [site.state / name for name in ("ca.pem", "certificate.pem", "tls.key")]
    context = module.make_tls(*names)
    assert [SimpleNamespace(**one).subject for one in context.get_ca_certs()] == [
        ((("commonName", "trial CA"),),)
    ]
    assert context.minimum_version.name == "TLSv1_2"
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"
