"""Each site gets its own request, and only the reply that belongs to it is taken."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from support.scripted_grid import TRAIN, TRAINED, failures, federation, invited, says

from fedgraft.common.messages.codec import SMALL, Stage, decode, encode, wire_bytes
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    PlanReply,
    PlanRequest,
    Refusal,
    Request,
    ResultReply,
    ResultRequest,
    SharesAsk,
    TrainReply,
    TrainRequest,
    UnmaskAsk,
    Work,
)
from fedgraft.common.messages.payloads import Reply as AnyReply
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

# To each its own

SMALL_VECTOR = np.arange(1000, dtype=np.float32)
VECTOR = np.arange(SMALL // 4 + 1, dtype=np.float32)


def tasks(adapter: np.ndarray[Any, Any]) -> dict[str, Request]:
    """One adapter, and what each site's neighbours sealed for it."""
    return {
        name: MaskedTrain(
            replace(TRAIN, adapter=adapter),
            Delivery((Envelope(0, place, name.encode() * 99),) * place),
        )
        for place, name in enumerate("abc")
    }


TASKS = tasks(VECTOR)
MASKED = MaskedInput(0, np.zeros(7, np.uint8), b"signature")


@pytest.mark.parametrize("adapter", [SMALL_VECTOR, VECTOR], ids=["small", "large"])
def test_each_site_gets_the_request_that_is_meant_for_it(adapter: np.ndarray[Any, Any]) -> None:
    own = tasks(adapter)
    transport, grid, _ = federation({name: says(MASKED) for name in "abc"})
    backwards = {name: own[name] for name in "cba"}
    replies = list(transport.ask(["a", "c"], Stage.TRAIN, backwards, 10.0))
    assert failures(replies) == [("a", ""), ("c", "")]
    assert [message.metadata.dst_node_id for message in grid.sent] == [11, 13]
    for name, message, reply in zip("ac", grid.sent, replies, strict=True):
        got, meant = decode(message.content, MaskedTrain), own[name]
        assert isinstance(meant, MaskedTrain)
        assert got.delivery == meant.delivery
        assert got.train.adapter.tobytes() == adapter.tobytes()
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


@pytest.mark.parametrize("adapter", [SMALL_VECTOR, VECTOR], ids=["small", "large"])
def test_a_request_that_is_everybodys_is_held_once(adapter: np.ndarray[Any, Any]) -> None:
    transport, grid, _ = federation({name: says(TRAINED) for name in "abc"})
    list(transport.ask(list("abc"), Stage.TRAIN, replace(TRAIN, adapter=adapter), 10.0))
    assert len({id(message.content["payload"]) for message in grid.sent}) == 1


def test_small_arrays_need_no_record_of_their_own() -> None:
    transport, grid, _ = federation({name: says(MASKED) for name in "abc"})
    list(transport.ask(list("abc"), Stage.TRAIN, tasks(SMALL_VECTOR), 10.0))
    assert [list(message.content) for message in grid.sent] == [["payload"]] * 3


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
    ResultRequest: (
        Stage.RESULT,
        ResultRequest("session", 1, "run", "{}", ("w",), 2, (), np.zeros(3, np.float32)),
        ResultReply,
    ),
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
    ResultReply("session"),
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
