"""What goes wrong at one site is that site's failure."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from support.scripted_grid import TRAIN, TRAINED, Clock, ScriptedGrid, federation, only_reply, says

from fedgraft.common.messages.codec import SMALL, Stage, encode, wire_bytes
from fedgraft.common.messages.payloads import EvaluateReply, Payload, Refusal, TrainReply
from fedgraft.server.protocol.transport import Reply, Transport

# Failures


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (2, "app-failed"),
        (3, "expired"),
        (5, "site-unreachable"),
        (8, "app-died"),
        (99, "flower-error-99"),
    ],
)
def test_an_error_of_flower_becomes_a_reason(code: int, failure: str) -> None:
    reply = only_reply(lambda message: Error(code, "Traceback: patient Ada"))
    assert reply == Reply("a", failure=failure, bytes_down=wire_bytes(encode(TRAIN)))


def _with(payload: Payload, **changes: Any) -> RecordDict:
    """The payload's record with entries of its config replaced, or with None taken out."""
    record = encode(payload)
    config = {**record["payload"], **changes}
    record["payload"] = ConfigRecord({k: v for k, v in config.items() if v is not None})
    return record


def _with_array(array: Array) -> RecordDict:
    """A reply with ``array`` beside the payload's record, as large ones are."""
    record = _with(TRAINED, update=None)
    record["arrays"] = ArrayRecord({"update": array})
    return record


PICKLED = b"\x93NUMPY\x01\x00\x14\x00{'descr':'|O'}\n"
NPY = Array(TRAINED.update).data


LARGE = replace(TRAINED, update=np.ones(SMALL, np.float32))
MALFORMED = {
    "empty": RecordDict(),
    "another record": RecordDict({"arrays": ArrayRecord({})}),
    "unknown kind": _with(TRAINED, kind="Exec"),
    "another stage's reply": encode(EvaluateReply("session", 1, np.zeros(5))),
    "a request": encode(TRAIN),
    "the format before": _with(TRAINED, format=1),
    "a format to come": _with(TRAINED, format=3),
    "a field missing": _with(TRAINED, loss=None),
    "a field too many": _with(TRAINED, extra=1),
    "text for a number": _with(TRAINED, examples="5"),
    "a truth for a number": _with(TRAINED, examples=True),
    "a whole number for a loss": _with(TRAINED, loss=1),
    "a number for an array": RecordDict({"payload": _with(TRAINED, update=1.0)["payload"]}),
    "no array": _with(TRAINED, update=None),
    "no large array": RecordDict({"payload": encode(LARGE)["payload"]}),
    "an array twice": RecordDict(
        {"payload": encode(TRAINED)["payload"], "arrays": encode(LARGE)["arrays"]}
    ),
    "garbage for a small array": _with(TRAINED, update=b"garbage"),
    "a pickle for a small array": _with(TRAINED, update=PICKLED),
    "a small array cut short": _with(TRAINED, update=NPY[:-1]),
    "a byte behind a small array": _with(TRAINED, update=NPY + b"x"),
    "garbage for an array": _with_array(Array("float32", (3,), "numpy.ndarray", b"garbage")),
    "a pickle for an array": _with_array(Array("object", (1,), "numpy.ndarray", PICKLED)),
    "an array of a foreign library": _with_array(Array("float32", (3,), "torch.Tensor", b"x")),
}


def test_what_the_malformed_are_made_of_is_well_formed() -> None:
    beside = _with_array(Array(TRAINED.update))
    for content in (_with(TRAINED), _with(TRAINED, update=NPY), encode(LARGE), beside):
        reply = only_reply(lambda message, content=content: content)  # type: ignore[misc]
        assert isinstance(reply.payload, TrainReply)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_reply_is_its_sites_failure(name: str) -> None:
    reply = only_reply(lambda message: MALFORMED[name])
    assert (reply.site, reply.payload, reply.failure) == ("a", None, "malformed")
    assert reply.bytes_up == wire_bytes(MALFORMED[name])


def test_a_refusal_is_a_failure_with_its_code() -> None:
    refusal = Refusal("session", "loss-not-finite")
    reply = only_reply(says(refusal))
    assert (reply.payload, reply.failure) == (None, "loss-not-finite")
    assert reply.bytes_up == wire_bytes(encode(refusal))


def test_a_refusals_code_cannot_fill_the_log() -> None:
    assert only_reply(says(Refusal("session", "x" * 10_000))).failure == "bad-code"


@pytest.mark.parametrize("code", ["", "\x1b[2J all fine", "two\nlines", "a b"])
def test_a_refusals_code_cannot_write_to_a_terminal(code: str) -> None:
    assert only_reply(says(Refusal("session", code))).failure == "bad-code"


def test_a_failure_of_one_site_does_not_touch_another() -> None:
    transport, _, _ = federation(
        {
            "a": lambda message: Error(2, ""),
            "b": lambda message: RecordDict(),
            "c": says(TRAINED),
            "d": says(Refusal("session", "no-examples")),
        }
    )
    replies = {r.site: r for r in transport.ask(list("abcd"), Stage.TRAIN, TRAIN, 10.0)}
    assert [replies[name].failure for name in "abcd"] == [
        "app-failed",
        "malformed",
        "",
        "no-examples",
    ]
    assert isinstance(replies["c"].payload, TrainReply)


def test_a_reply_that_comes_twice_counts_once() -> None:
    class Stammering(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [reply for one in super().pull_messages(message_ids) for reply in (one, one)]

    grid = Stammering({11: says(TRAINED), 12: says(TRAINED)})
    transport = Transport(grid, clock=Clock(), pause=lambda seconds: None)
    transport._nodes.update({"a": 11, "b": 12})
    replies = list(transport.ask(["a", "b"], Stage.TRAIN, TRAIN, 10.0))
    assert [reply.site for reply in replies] == ["a", "b"]


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_message_that_could_not_be_sent_is_its_sites_failure(nothing: str | None) -> None:
    # The SuperLink gives no id to a message whose node has gone.
    class Lossy(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            kept = list(super().push_messages(messages))
            return [nothing, kept[1], nothing]  # type: ignore[list-item]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            assert all(message_ids)
            return super().pull_messages(message_ids)

    clock = Clock()
    grid = Lossy({11: says(TRAINED), 12: says(TRAINED), 13: says(TRAINED)})
    transport = Transport(grid, clock=clock, pause=clock.pause)
    transport._nodes.update({"a": 11, "b": 12, "c": 13})
    replies = list(transport.ask(list("abc"), Stage.TRAIN, TRAIN, 10.0))
    assert sorted(reply.site for reply in replies) == list("abc")
    assert [reply.site for reply in replies if not reply.failure] == ["b"]


def test_messages_that_are_too_large_to_send_are_every_sites_failure() -> None:
    # What Flower's HTTP grid returns when the SuperLink answers 413.
    class Narrow(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return []

    transport = Transport(Narrow({}), clock=Clock(), pause=lambda seconds: None)
    transport._nodes.update({"a": 11, "b": 12})
    replies = list(transport.ask(["a", "b"], Stage.TRAIN, TRAIN, 10.0))
    assert sorted((reply.site, bool(reply.failure)) for reply in replies) == [
        ("a", True),
        ("b", True),
    ]
