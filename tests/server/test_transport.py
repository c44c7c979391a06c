"""Replies come one by one as they arrive; what goes wrong at one site is that site's failure."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.common.messages import Stage, decode, encode, wire_bytes
from fedgraft.common.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    Payload,
    PlanReply,
    PlanRequest,
    Refusal,
    Request,
    SharesAsk,
    TrainReply,
    TrainRequest,
    UnmaskAsk,
    Work,
)
from fedgraft.common.payloads import (
    Reply as AnyReply,
)
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    Envelope,
    KeysRequest,
    MaskedInput,
    Opening,
    RevealedShare,
    SealedShares,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.server.transport import Reply, Transport

Answer = Callable[[Message], RecordDict | Error | None]

PLAN = PlanRequest("session", "{}", "backbone", "layout", ("w",), "fixed")
TRAIN = TrainRequest("session", 1, 0, "{}", ("w",), np.zeros(3, np.float32))
TRAINED = TrainReply("session", 1, "layout", 5, 0.5, np.ones(3, np.float32))


class ScriptedGrid(Grid):  # type: ignore[misc]  # flwr is untyped here
    """Nodes in memory: each answers a message with a record, an error or, with None, never.

    ``late[node]`` is after how many pulls of its message a node's reply is there.
    """

    def __init__(self, nodes: dict[int, Answer], late: dict[int, int] | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes, self.late = nodes, late or {}
        self.sent: list[Message] = []
        self.answered: list[int] = []
        self._waiting: dict[str, Message] = {}
        self._pulls: dict[str, int] = {}
        self._count = itertools.count()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            identifier = f"message-{next(self._count)}"
            message.metadata.__dict__["_message_id"] = identifier
            self._waiting[identifier] = message
            self.sent.append(message)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            if identifier not in self._waiting:
                continue
            message = self._waiting[identifier]
            node = message.metadata.dst_node_id
            self._pulls[identifier] = self._pulls.get(identifier, 0) + 1
            if self._pulls[identifier] <= self.late.get(node, 0):
                continue
            content = self.nodes[node](message)
            if content is not None:
                del self._waiting[identifier]
                self.answered.append(node)
                replies.append(Message(content, reply_to=message))
        return replies

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def says(payload: Payload) -> Answer:
    return lambda message: encode(payload)


def site(name: str, reply: Answer = says(TRAINED)) -> Answer:  # noqa: B008
    """A node that takes part under ``name`` and answers everything else with ``reply``."""

    def answer(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == Stage.PLAN:
            return encode(PlanReply("session", name))
        return reply(message)

    return answer


def silent(message: Message) -> None:
    return None


def federation(
    sites: dict[str, Answer], late: dict[int, int] | None = None
) -> tuple[Transport, ScriptedGrid, Clock]:
    """A transport that has invited these sites; they are nodes 11, 12, ... in this order."""
    nodes = {11 + index: site(name, sites[name]) for index, name in enumerate(sites)}
    grid, clock = ScriptedGrid(nodes), Clock()
    transport = Transport(grid, clock=clock, pause=clock.pause)
    replies = list(transport.invite(PLAN, 60.0))
    assert all(isinstance(reply.payload, PlanReply) for reply in replies)
    grid.late = late or {}
    grid.sent.clear()
    grid.answered.clear()
    clock.pauses.clear()
    return transport, grid, clock


def only_reply(answer: Answer) -> Reply:
    transport, _, _ = federation({"a": answer})
    (reply,) = transport.ask(["a"], Stage.TRAIN, TRAIN, 10.0)
    return reply


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


def test_the_bytes_of_a_reply_are_counted() -> None:
    reply = only_reply(says(TRAINED))
    assert reply.bytes_up == wire_bytes(encode(TRAINED)) > 3 * 4


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
    assert second[-1] == max(second) == 0.25


# To each its own

VECTOR = np.zeros(1000, np.float32)
TASKS: dict[str, Request] = {  # one adapter, and what each site's neighbours sealed for it
    name: MaskedTrain(
        replace(TRAIN, adapter=VECTOR), Delivery((Envelope(0, place, name.encode() * 99),) * place)
    )
    for place, name in enumerate("abc")
}
MASKED = MaskedInput(0, np.zeros(7, np.uint8), b"signature")


def test_each_site_gets_the_request_that_is_meant_for_it() -> None:
    transport, grid, _ = federation({name: says(MASKED) for name in "abc"})
    backwards = {name: TASKS[name] for name in "cba"}
    replies = list(transport.ask(["a", "c"], Stage.TRAIN, backwards, 10.0))
    assert failures(replies) == [("a", ""), ("c", "")]
    assert [message.metadata.dst_node_id for message in grid.sent] == [11, 13]
    for name, message, reply in zip("ac", grid.sent, replies, strict=True):
        got, meant = decode(message.content, MaskedTrain), TASKS[name]
        assert isinstance(meant, MaskedTrain)
        assert got.delivery == meant.delivery
        assert got.train.adapter.tobytes() == VECTOR.tobytes()
        assert reply.bytes_down == wire_bytes(encode(meant))


def test_sites_are_not_asked_only_because_there_is_a_request_for_them() -> None:
    transport, grid, _ = federation({name: says(MASKED) for name in "abc"})
    list(transport.ask(["b"], Stage.TRAIN, TASKS, 10.0))
    assert [message.metadata.dst_node_id for message in grid.sent] == [12]


def test_a_site_without_a_request_of_its_own_is_a_mistake_and_nothing_is_sent() -> None:
    transport, grid, _ = federation({name: says(MASKED) for name in "abc"})
    with pytest.raises(KeyError):
        list(transport.ask(["a", "b"], Stage.TRAIN, {"a": TASKS["a"]}, 10.0))
    assert grid.sent == []


def test_what_the_requests_have_in_common_is_held_once() -> None:
    transport, grid, _ = federation({name: says(MASKED) for name in "abc"})
    list(transport.ask(list("abc"), Stage.TRAIN, TASKS, 10.0))
    adapters = {id(message.content["arrays"]["train.adapter"].data) for message in grid.sent}
    assert len(grid.sent) == 3
    assert len(adapters) == 1


def test_each_reply_is_read_as_the_answer_to_its_own_request() -> None:
    mixed: dict[str, Request] = {"a": TRAIN, "b": TASKS["b"], "c": TRAIN, "d": TASKS["b"]}
    answers = {"a": says(TRAINED), "b": says(MASKED), "c": says(MASKED), "d": says(TRAINED)}
    transport, _, _ = federation(answers, late={11: 3, 12: 2, 13: 1})
    replies = list(transport.ask(list("abcd"), Stage.TRAIN, mixed, 10.0))
    assert sorted(failures(replies)) == [
        ("a", ""),
        ("b", ""),
        ("c", "malformed"),
        ("d", "malformed"),
    ]


# Which reply belongs to which request

EVALUATE = EvaluateRequest("session", 1, "{}", ("w",), "test", np.zeros(3, np.float32))
WORK = Work("train", 1, 0, "train", "{}", ("w",), b"adapter")
ADVERTISED = Advertisement(1, b"mask", b"seal", b"commitment", b"signature")
ASKED: dict[type[Request], tuple[Stage, Request, type[AnyReply]]] = {
    TrainRequest: (Stage.TRAIN, TRAIN, TrainReply),
    EvaluateRequest: (Stage.EVALUATE, EVALUATE, EvaluateReply),
    KeysAsk: (
        Stage.KEYS,
        KeysAsk("session", WORK, (0, 1, 2), KeysRequest(1, b"c", b"m")),
        Advertisement,
    ),
    SharesAsk: (Stage.SHARES, SharesAsk("session", SharesRequest((ADVERTISED,))), SealedShares),
    MaskedTrain: (Stage.TRAIN, MaskedTrain(TRAIN, Delivery(())), MaskedInput),
    MaskedEvaluate: (Stage.EVALUATE, MaskedEvaluate(EVALUATE, Delivery(())), MaskedInput),
    ConfirmAsk: (
        Stage.CONFIRM,
        ConfirmAsk("session", Survivors((0, 1), (0,), (b"x",))),
        Confirmation,
    ),
    UnmaskAsk: (Stage.UNMASK, UnmaskAsk("session", UnmaskRequest(())), Opening),
}
ANSWERS: tuple[AnyReply, ...] = (
    PlanReply("session", "amy"),
    TRAINED,
    EvaluateReply("session", 1, np.zeros(5)),
    ADVERTISED,
    SealedShares(1, (Envelope(1, 0, b"sealed"),)),
    MASKED,
    Confirmation(1, b"signature"),
    Opening(1, (RevealedShare(0, b"share"),)),
)


def test_every_request_and_every_reply_is_tried() -> None:
    assert {PlanRequest, *ASKED} == set(get_args(Request))
    assert {Refusal, *map(type, ANSWERS)} == set(get_args(AnyReply))


@pytest.mark.parametrize("kind", ASKED, ids=lambda kind: str(kind.__name__))
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_only_the_reply_that_belongs_to_a_request_is_taken(
    kind: type[Request], answer: AnyReply
) -> None:
    stage, request, right = ASKED[kind]
    transport, grid, _ = federation({"a": says(answer)})
    (reply,) = transport.ask(["a"], stage, request, 10.0)
    assert grid.sent[0].metadata.message_type == stage.value
    if type(answer) is right:
        assert type(reply.payload) is right
        assert reply.failure == ""
    else:
        assert (reply.payload, reply.failure) == (None, "malformed")


@pytest.mark.parametrize("kind", ASKED, ids=lambda kind: str(kind.__name__))
def test_every_request_may_be_refused(kind: type[Request]) -> None:
    stage, request, _ = ASKED[kind]
    transport, _, _ = federation({"a": says(Refusal("session", "abstained"))})
    (reply,) = transport.ask(["a"], stage, request, 10.0)
    assert (reply.payload, reply.failure) == (None, "abstained")


@pytest.mark.parametrize("answer", ANSWERS[1:], ids=lambda answer: type(answer).__name__)
def test_an_invitation_is_answered_by_an_agreement_or_not_at_all(answer: AnyReply) -> None:
    transport, replies, _ = invited({11: says(answer)})
    assert failures(replies) == [("node 11", "malformed")]
    assert transport.sites == ()


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
    assert 30.0 <= clock.now - start <= 30.0 + 0.25


def test_a_reply_after_the_deadline_is_not_read() -> None:
    transport, grid, _ = federation({"a": says(TRAINED)}, late={11: 200})
    (reply,) = transport.ask(["a"], Stage.TRAIN, TRAIN, 10.0)
    assert (reply.failure, reply.payload) == ("deadline", None)
    assert grid.answered == []


def test_no_time_is_waited_when_all_are_there() -> None:
    transport, _, clock = federation({name: says(TRAINED) for name in "abc"})
    list(transport.ask(list("abc"), Stage.TRAIN, TRAIN, 10.0))
    assert clock.pauses == []


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
    record = encode(TRAINED)
    record["arrays"] = ArrayRecord({"update": array})
    return record


MALFORMED = {
    "empty": RecordDict(),
    "another record": RecordDict({"arrays": ArrayRecord({})}),
    "unknown kind": _with(TRAINED, kind="Exec"),
    "another stage's reply": encode(EvaluateReply("session", 1, np.zeros(5))),
    "a request": encode(TRAIN),
    "another format": _with(TRAINED, format=2),
    "a field missing": _with(TRAINED, loss=None),
    "a field too many": _with(TRAINED, extra=1),
    "text for a number": _with(TRAINED, examples="5"),
    "a truth for a number": _with(TRAINED, examples=True),
    "a whole number for a loss": _with(TRAINED, loss=1),
    "a number for an array": RecordDict({"payload": _with(TRAINED, update=1.0)["payload"]}),
    "no array": RecordDict({"payload": encode(TRAINED)["payload"]}),
    "garbage for an array": _with_array(Array("float32", (3,), "numpy.ndarray", b"garbage")),
    "a pickle for an array": _with_array(
        Array("object", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00\x14\x00{'descr':'|O'}\n")
    ),
    "an array of a foreign library": _with_array(Array("float32", (3,), "torch.Tensor", b"x")),
}


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


# Who takes part


def invited(nodes: dict[int, Answer]) -> tuple[Transport, list[Reply], ScriptedGrid]:
    clock = Clock()
    grid = ScriptedGrid(nodes)
    transport = Transport(grid, clock=clock, pause=clock.pause)
    return transport, list(transport.invite(PLAN, 5.0)), grid


def failures(replies: Sequence[Reply]) -> list[tuple[str, str]]:
    return [(reply.site, reply.failure) for reply in replies]


def test_sites_that_agree_are_known_by_name_in_order() -> None:
    transport, replies, _ = invited({11: site("zoe"), 12: site("amy")})
    assert transport.sites == ("amy", "zoe")
    assert failures(replies) == [("zoe", ""), ("amy", "")]


def test_a_site_that_refuses_or_is_late_does_not_take_part() -> None:
    no = says(Refusal("session", "backbone-differs"))
    transport, replies, _ = invited({11: no, 12: site("amy"), 13: silent})
    assert transport.sites == ("amy",)
    assert failures(replies) == [
        ("node 11", "backbone-differs"),
        ("amy", ""),
        ("node 13", "deadline"),
    ]


def test_nodes_that_are_known_are_not_asked_again_but_new_ones_are() -> None:
    transport, _, grid = invited({11: site("amy"), 12: says(Refusal("session", "no-examples"))})
    grid.sent.clear()
    grid.nodes.update({12: site("bob"), 13: site("cid")})
    replies = list(transport.invite(PLAN, 5.0))
    assert [message.metadata.dst_node_id for message in grid.sent] == [12, 13]
    assert failures(replies) == [("bob", ""), ("cid", "")]
    assert transport.sites == ("amy", "bob", "cid")


def test_a_name_belongs_to_the_first_node_that_takes_it() -> None:
    first = site("amy", says(replace(TRAINED, examples=1)))
    second = site("amy", says(replace(TRAINED, examples=2)))
    transport, replies, _ = invited({11: first, 12: second})
    assert failures(replies) == [("amy", ""), ("amy", "name-taken")]
    assert replies[1].payload is None
    assert transport.sites == ("amy",)
    (reply,) = transport.ask(["amy"], Stage.TRAIN, TRAIN, 5.0)
    assert isinstance(reply.payload, TrainReply)
    assert reply.payload.examples == 1


def test_a_site_that_registers_anew_takes_part_again() -> None:
    # A coordinator's restart gives every node another id: the old one is then gone.
    transport, _, grid = invited({11: site("amy"), 12: site("bob")})
    del grid.nodes[11]
    grid.nodes[21] = site("amy", says(replace(TRAINED, examples=21)))
    assert failures(list(transport.invite(PLAN, 5.0))) == [("amy", "")]
    (reply,) = transport.ask(["amy"], Stage.TRAIN, TRAIN, 5.0)
    assert isinstance(reply.payload, TrainReply)
    assert reply.payload.examples == 21


def test_only_members_take_part_and_others_are_named() -> None:
    clock = Clock()
    grid = ScriptedGrid({11: site("zoe"), 12: site("eve"), 13: site("amy"), 14: silent})
    transport = Transport(grid, clock=clock, pause=clock.pause)
    replies = list(transport.invite(PLAN, 5.0, members={"amy": 0, "bob": 1, "zoe": 2}))
    assert failures(replies) == [
        ("zoe", ""),
        ("eve", "not-in-roster"),
        ("amy", ""),
        ("node 14", "deadline"),
    ]
    assert replies[1].payload is None
    assert replies[1].bytes_up > 0
    assert transport.sites == ("amy", "zoe")
    with pytest.raises(KeyError):
        list(transport.ask(["eve"], Stage.TRAIN, TRAIN, 5.0))


def test_where_nobody_is_a_member_nobody_takes_part() -> None:
    transport = Transport(ScriptedGrid({11: site("amy")}), clock=Clock(), pause=lambda s: None)
    replies = list(transport.invite(PLAN, 5.0, members=()))
    assert failures(replies) == [("amy", "not-in-roster")]
    assert transport.sites == ()


def test_a_name_that_is_none_is_never_shown_even_where_members_are_known() -> None:
    transport = Transport(ScriptedGrid({11: site("\x1b[2J")}), clock=Clock(), pause=lambda s: None)
    replies = list(transport.invite(PLAN, 5.0, members={"amy"}))
    assert failures(replies) == [("node 11", "bad-name")]


def test_who_did_not_agree_is_asked_again_only_on_request() -> None:
    transport, _, grid = invited({11: site("amy"), 12: says(Refusal("session", "no-examples"))})
    grid.sent.clear()
    grid.nodes[13] = site("cid")
    list(transport.invite(PLAN, 5.0, again=False))
    assert [message.metadata.dst_node_id for message in grid.sent] == [13]
    grid.sent.clear()
    list(transport.invite(PLAN, 5.0))
    assert [message.metadata.dst_node_id for message in grid.sent] == [12]


@pytest.mark.parametrize("name", ["", "../etc", "a\nb", "\x1b[2J", "x" * 65, "a b"])
def test_a_name_that_is_none_is_not_taken(name: str) -> None:
    # It would go into folders, logs, terminals and the report.
    transport, replies, _ = invited({11: site(name), 12: site("bob")})
    assert transport.sites == ("bob",)
    assert [reply.site for reply in replies if not reply.failure] == ["bob"]


def test_an_agreement_to_another_session_is_none() -> None:
    transport, replies, _ = invited({11: says(PlanReply("another", "amy"))})
    assert transport.sites == ()
    assert [bool(reply.failure) for reply in replies] == [True]


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
    assert 7.0 <= clock.now - start <= 7.5
