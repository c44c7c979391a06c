"""Replies come one by one as they arrive, each request is sent once, and waiting ends."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from support.scripted_grid import (
    PLAN,
    TRAIN,
    TRAINED,
    Answer,
    Clock,
    ScriptedGrid,
    failures,
    federation,
    invited,
    only_reply,
    says,
    silent,
    site,
)

from fedgraft.common.messages.codec import SMALL, Stage, decode, encode, wire_bytes
from fedgraft.common.messages.payloads import Refusal, TrainReply, TrainRequest
from fedgraft.server.protocol.transport import Transport

# Asking


def test_every_site_asked_gets_the_request_and_nobody_else() -> None:
    transport, grid, _ = federation({name: says(TRAINED) for name in "abc"})
    replies = list(transport.ask(["a", "c"], Stage.TRAIN, TRAIN, 25.0))
    assert [(reply.site, reply.failure) for reply in replies] == [("a", ""), ("c", "")]
    assert [message.metadata.dst_node_id for message in grid.sent] == [11, 13]
    for message in grid.sent:
        assert message.metadata.message_type == "train"
        assert message.metadata.ttl == 25.0
        assert decode(message.content, TrainRequest).adapter.tolist() == [0, 0, 0]


def test_replies_are_taken_in_the_order_they_arrive() -> None:
    sites = {name: says(replace(TRAINED, examples=ord(name))) for name in "abcd"}
    transport, _, _ = federation(sites, late={11: 3, 12: 1, 13: 2, 14: 0})
    replies = list(transport.ask(list("abcd"), Stage.TRAIN, TRAIN, 10.0))
    assert [reply.site for reply in replies] == list("dbca")
    for reply in replies:  # each site's own reply, not its neighbour's
        assert isinstance(reply.payload, TrainReply)
        assert reply.payload.examples == ord(reply.site)


def test_a_reply_is_handed_on_before_the_next_is_pulled() -> None:
    transport, grid, _ = federation({name: says(TRAINED) for name in "abc"})
    replies = transport.ask(list("abc"), Stage.TRAIN, TRAIN, 10.0)
    next(replies)
    assert grid.answered == [11]
    next(replies)
    assert grid.answered == [11, 12]


def test_asking_nobody_sends_nothing() -> None:
    transport, grid, _ = federation({"a": says(TRAINED)})
    assert list(transport.ask([], Stage.TRAIN, TRAIN, 10.0)) == []
    assert grid.sent == []


@pytest.mark.parametrize("length", [3, SMALL])
def test_the_bytes_of_a_reply_are_counted(length: int) -> None:
    trained = replace(TRAINED, update=np.ones(length, np.float32))
    reply = only_reply(says(trained))
    assert reply.bytes_up == wire_bytes(encode(trained)) > length * 4


def test_the_bytes_of_a_request_are_counted_with_its_reply_whatever_that_is() -> None:
    sites: dict[str, Answer] = {
        "a": says(TRAINED),
        "b": says(Refusal("session", "no-examples")),
        "c": lambda message: RecordDict(),
        "d": lambda message: Error(2, ""),
        "e": silent,
    }
    transport, _, _ = federation(sites)
    replies = {r.site: r for r in transport.ask(list("abcde"), Stage.TRAIN, TRAIN, 5.0)}
    sent = wire_bytes(encode(TRAIN))
    assert sent > TRAIN.adapter.nbytes
    assert {name: replies[name].bytes_down for name in "abcde"} == dict.fromkeys("abcde", sent)
    assert [bool(replies[name].bytes_up) for name in "abcde"] == [True, True, False, False, False]


def test_an_invitation_costs_bytes_too() -> None:
    _, replies, _ = invited({11: site("amy"), 12: silent})
    assert [reply.bytes_down for reply in replies] == [wire_bytes(encode(PLAN))] * 2


def test_what_was_never_sent_cost_nothing() -> None:
    class Narrow(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return []

    transport = Transport(Narrow({}), clock=Clock(), pause=lambda seconds: None)
    transport._nodes["a"] = 11
    (reply,) = transport.ask(["a"], Stage.TRAIN, TRAIN, 10.0)
    assert (reply.failure, reply.bytes_down) == ("not-sent", 0)


def test_waiting_backs_off_and_starts_afresh_after_a_reply() -> None:
    transport, _, clock = federation({"a": says(TRAINED), "b": says(TRAINED)}, late={11: 4, 12: 14})
    list(transport.ask(["a", "b"], Stage.TRAIN, TRAIN, 100.0))
    first, second = clock.pauses[:4], clock.pauses[4:]
    assert first[0] <= 0.002
    assert first == [first[0] * 2**n for n in range(4)]
    assert second[:4] == first
    assert second[-1] == max(second) == 0.1


# The deadline


def test_a_late_site_fails_and_the_others_count() -> None:
    transport, _, clock = federation({"a": silent, "b": says(TRAINED), "c": silent})
    start = clock.now
    replies = list(transport.ask(list("abc"), Stage.TRAIN, TRAIN, 30.0))
    assert [(reply.site, reply.failure) for reply in replies] == [
        ("b", ""),
        ("a", "deadline"),
        ("c", "deadline"),
    ]
    assert 30.0 <= clock.now - start <= 30.0 + 0.1


def test_a_reply_after_the_deadline_is_not_read() -> None:
    transport, grid, _ = federation({"a": says(TRAINED)}, late={11: 200})
    (reply,) = transport.ask(["a"], Stage.TRAIN, TRAIN, 10.0)
    assert (reply.failure, reply.payload) == ("deadline", None)
    assert grid.answered == []


def test_no_time_is_waited_when_all_are_there() -> None:
    transport, _, clock = federation({name: says(TRAINED) for name in "abc"})
    list(transport.ask(list("abc"), Stage.TRAIN, TRAIN, 10.0))
    assert clock.pauses == []


# Nothing is sent twice


def test_whatever_becomes_of_a_request_it_is_sent_once() -> None:
    """A site answers each stage of a masked round once: a second copy would look like an attack."""
    sites: dict[str, Answer] = {
        "a": says(TRAINED),
        "b": says(Refusal("session", "no-examples")),
        "c": lambda message: RecordDict(),
        "d": lambda message: Error(5, ""),
        "e": silent,
        "f": says(TRAINED),
    }
    transport, grid, _ = federation(sites, late={16: 9})
    replies = list(transport.ask(list("abcdef"), Stage.TRAIN, TRAIN, 30.0))
    assert [message.metadata.dst_node_id for message in grid.sent] == [11, 12, 13, 14, 15, 16]
    assert sorted(reply.site for reply in replies) == list("abcdef")


def test_what_could_not_be_sent_is_not_tried_again() -> None:
    pushed: list[int] = []

    class Lossy(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            batch = list(messages)
            pushed.extend(message.metadata.dst_node_id for message in batch)
            return [""] * len(batch)

    clock = Clock()
    transport = Transport(Lossy({}), clock=clock, pause=clock.pause)
    transport._nodes.update({"a": 11, "b": 12})
    replies = list(transport.ask(["a", "b"], Stage.TRAIN, TRAIN, 10.0))
    assert failures(replies) == [("a", "not-sent"), ("b", "not-sent")]
    assert pushed == [11, 12]
    assert clock.pauses == []  # there is nothing to wait for


# Waiting for nodes


def test_waiting_ends_when_enough_nodes_are_there() -> None:
    clock = Clock()
    grid = ScriptedGrid({11: silent})

    def pause(seconds: float) -> None:
        clock.pause(seconds)
        if len(clock.pauses) == 3:
            grid.nodes[12] = silent

    Transport(grid, clock=clock, pause=pause).wait_for(2, 60.0)
    assert len(clock.pauses) == 3


def test_waiting_for_nodes_ends_at_the_deadline() -> None:
    clock = Clock()
    start = clock.now
    Transport(ScriptedGrid({}), clock=clock, pause=clock.pause).wait_for(1, 7.0)
    assert 7.0 <= clock.now - start <= 7.1 + 1e-9
