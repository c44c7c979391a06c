"""Where replies are signed, only the site that was asked can have answered what it was asked."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from support.scripted_grid import PLAN, TRAIN, TRAINED, Answer, Clock, ScriptedGrid, failures, says

from fedgraft.common.messages.codec import SMALL, Stage, encode, wire_bytes
from fedgraft.common.messages.payloads import Payload, PlanReply, Refusal, TrainReply
from fedgraft.common.messages.signatures import seal
from fedgraft.common.secagg.keys import Identity
from fedgraft.server.protocol.transport import Reply, Transport

NAMES = ("amy", "bob", "eve")
IDENTITIES = {name: Identity(bytes([place]) * 32) for place, name in enumerate(NAMES, 1)}
MEMBERS = {name: IDENTITIES[name].public for name in ("amy", "bob")}  # eve is a stranger
LARGE = replace(TRAINED, update=np.ones(SMALL, np.float32))
both_layouts = pytest.mark.parametrize("answer", [TRAINED, LARGE], ids=["small", "large"])


def sealed(payload: Payload, name: str, *, by: str = "", request: str) -> RecordDict:
    """A reply with the seal of ``name``, made with the key of ``by`` if not with its own."""
    content = encode(payload)
    seal(content, site=name, request=request, sign=IDENTITIES[by or name].sign)
    return content


def signs(payload: Payload, name: str, *, by: str = "", request: str = "") -> Answer:
    """A node that answers with that seal, on ``request`` if not on what it was asked."""

    def answer(message: Message) -> RecordDict:
        asked = request or message.metadata.message_id
        return sealed(payload, name, by=by, request=asked)

    return answer


def member(name: str, reply: Answer) -> Answer:
    """A site that takes part under its own seal, and answers everything else with ``reply``."""

    def answer(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == Stage.PLAN:
            return signs(PlanReply("session", name), name)(message)
        return reply(message)

    return answer


def transport_to(nodes: dict[int, Answer], grid: type[ScriptedGrid] = ScriptedGrid) -> Transport:
    clock = Clock()
    return Transport(grid(nodes), key_of=MEMBERS.get, clock=clock, pause=clock.pause)


def reply_of(answer: Answer, grid: type[ScriptedGrid] = ScriptedGrid) -> Reply:
    """What comes of asking amy, if ``answer`` is what she or somebody else says."""
    transport = transport_to({11: member("amy", answer)}, grid)
    assert failures(list(transport.invite(PLAN, 5.0))) == [("amy", "")]
    (reply,) = transport.ask(["amy"], Stage.TRAIN, TRAIN, 5.0)
    return reply


def refused(reply: Reply) -> bool:
    return (reply.site, reply.payload, reply.failure) == ("amy", None, "bad-seal") and (
        reply.sealed is None
    )


# Asking


@both_layouts
def test_a_reply_under_the_sites_own_seal_counts(answer: TrainReply) -> None:
    reply = reply_of(signs(answer, "amy"))
    assert isinstance(reply.payload, TrainReply)
    assert reply.payload.update.tobytes() == answer.update.tobytes()
    assert (reply.site, reply.sealed, reply.failure) == ("amy", "amy", "")
    assert reply.bytes_up == wire_bytes(sealed(answer, "amy", request="message-1"))


@both_layouts
def test_an_unsealed_reply_does_not(answer: TrainReply) -> None:
    reply = reply_of(says(answer))
    assert refused(reply)
    assert reply.bytes_up == wire_bytes(encode(answer))


@both_layouts
def test_another_sites_seal_does_not(answer: TrainReply) -> None:
    """Bob's is a good seal on this very request; but it was amy who was asked."""
    assert refused(reply_of(signs(answer, "bob")))


@pytest.mark.parametrize(("name", "by"), [("amy", "bob"), ("amy", "eve"), ("bob", "amy")])
def test_a_name_that_is_not_the_signers_does_not(name: str, by: str) -> None:
    assert refused(reply_of(signs(TRAINED, name, by=by)))


def test_the_seal_of_a_stranger_does_not() -> None:
    assert refused(reply_of(signs(TRAINED, "eve")))


def test_two_sites_cannot_answer_for_each_other() -> None:
    """What each says is good, and under its own seal."""
    nodes = {11: member("amy", signs(TRAINED, "bob")), 12: member("bob", signs(TRAINED, "amy"))}
    transport = transport_to(nodes)
    list(transport.invite(PLAN, 5.0))
    replies = list(transport.ask(["amy", "bob"], Stage.TRAIN, TRAIN, 5.0))
    assert failures(replies) == [("amy", "bad-seal"), ("bob", "bad-seal")]


def test_who_cannot_seal_spoils_nothing_for_others() -> None:
    nodes = {11: member("amy", says(TRAINED)), 12: member("bob", signs(TRAINED, "bob"))}
    transport = transport_to(nodes)
    list(transport.invite(PLAN, 5.0))
    replies = list(transport.ask(["amy", "bob"], Stage.TRAIN, TRAIN, 5.0))
    assert failures(replies) == [("amy", "bad-seal"), ("bob", "")]


@pytest.mark.parametrize("payload", [Refusal("session", "abstained"), TRAINED, LARGE])
def test_what_was_changed_on_its_way_does_not(payload: Payload) -> None:
    def changed(message: Message) -> RecordDict:
        content = sealed(payload, "amy", request=message.metadata.message_id)
        content["payload"]["session"] = "another"
        return content

    assert refused(reply_of(changed))


def test_a_large_array_that_was_changed_on_its_way_does_not() -> None:
    def changed(message: Message) -> RecordDict:
        content = sealed(LARGE, "amy", request=message.metadata.message_id)
        content["arrays"] = ArrayRecord({"update": Array(2 * LARGE.update)})
        return content

    assert refused(reply_of(changed))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"payload": ArrayRecord({})}),
        RecordDict({"payload": ConfigRecord({"seal.site": 1, "seal.signature": b"x" * 64})}),
        RecordDict({"payload": ConfigRecord({"seal.site": "amy", "seal.signature": "x" * 64})}),
        RecordDict({"payload": ConfigRecord({"seal.site": ["amy"], "seal.signature": [b"x"]})}),
        RecordDict({"payload": ConfigRecord({"seal.site": "amy", "seal.signature": b""})}),
    ],
)
def test_a_seal_that_is_none_does_not(content: RecordDict) -> None:
    assert refused(reply_of(lambda message: content))


def test_a_good_seal_makes_no_good_reply() -> None:
    for payload in (TRAIN, PlanReply("session", "amy")):
        reply = reply_of(signs(payload, "amy"))
        assert (reply.payload, reply.failure) == (None, "malformed")


def test_a_refusal_needs_a_seal_too() -> None:
    refusal = Refusal("session", "abstained")
    assert reply_of(signs(refusal, "amy")).failure == "abstained"
    assert refused(reply_of(says(refusal)))
    assert refused(reply_of(signs(refusal, "bob")))


def test_an_error_is_flowers_own_and_has_none() -> None:
    assert reply_of(lambda message: Error(2, "")).failure == "app-failed"


# Replies to other requests


class Misnaming(ScriptedGrid):
    """Replies that say of themselves that they answer the first request that there was."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            assert reply.metadata.reply_to_message_id
            reply.metadata.__dict__["_reply_to_message_id"] = "message-0"
            assert reply.metadata.reply_to_message_id == "message-0"
        return replies


@pytest.mark.parametrize("grid", [ScriptedGrid, Misnaming])
@both_layouts
def test_a_replayed_reply_does_not_count_whatever_it_says_it_answers(
    grid: type[ScriptedGrid], answer: TrainReply
) -> None:
    assert refused(reply_of(signs(answer, "amy", request="message-0"), grid))


@both_layouts
def test_what_a_reply_says_of_itself_takes_nothing_from_it_either(answer: TrainReply) -> None:
    assert isinstance(reply_of(signs(answer, "amy"), Misnaming).payload, TrainReply)


def test_the_same_request_asked_again_needs_a_seal_of_its_own() -> None:
    kept: list[RecordDict] = []

    def once(message: Message) -> RecordDict:
        """What it said to the first, again and again."""
        kept.append(sealed(TRAINED, "amy", request=message.metadata.message_id))
        return kept[0].copy()

    transport = transport_to({11: member("amy", once)})
    list(transport.invite(PLAN, 5.0))
    replies = [reply for _ in range(2) for reply in transport.ask(["amy"], Stage.TRAIN, TRAIN, 5.0)]
    assert failures(replies) == [("amy", ""), ("amy", "bad-seal")]


# Invitations


def invite(
    nodes: dict[int, Answer], *, members: tuple[str, ...] | None = None
) -> tuple[Transport, list[Reply]]:
    transport = transport_to(nodes)
    return transport, list(transport.invite(PLAN, 5.0, members=members))


AMY = PlanReply("session", "amy")


def test_a_site_that_agrees_under_its_own_seal_takes_part() -> None:
    transport, (reply,) = invite({11: signs(AMY, "amy")})
    assert (reply.site, reply.payload, reply.sealed) == ("amy", AMY, "amy")
    assert transport.sites == ("amy",)


@pytest.mark.parametrize("members", [None, ("amy", "bob"), ("bob",)])
def test_an_agreement_under_another_sites_seal_is_none(members: tuple[str, ...] | None) -> None:
    """Bob may say who he is, but not that he is amy."""
    transport, (reply,) = invite({11: signs(AMY, "bob")}, members=members)
    assert (reply.site, reply.payload, reply.failure) == ("node 11", None, "another-sites-seal")
    assert reply.bytes_up > 0
    assert transport.sites == ()
    with pytest.raises(KeyError):
        list(transport.ask(["amy"], Stage.TRAIN, TRAIN, 5.0))


def test_who_came_under_anothers_name_has_not_taken_it() -> None:
    transport, replies = invite({11: signs(AMY, "bob"), 12: member("amy", signs(TRAINED, "amy"))})
    assert failures(replies) == [("node 11", "another-sites-seal"), ("amy", "")]
    (reply,) = transport.ask(["amy"], Stage.TRAIN, TRAIN, 5.0)
    assert isinstance(reply.payload, TrainReply)


@pytest.mark.parametrize(
    "answer",
    [
        says(AMY),
        signs(AMY, "amy", by="bob"),
        signs(AMY, "eve"),
        signs(PlanReply("session", "eve"), "eve"),
        signs(AMY, "amy", request="message-7"),
        says(Refusal("session", "backbone-differs")),
    ],
    ids=["unsealed", "forged", "stranger for her", "stranger", "replayed", "unsealed refusal"],
)
def test_an_agreement_without_a_good_seal_is_none(answer: Answer) -> None:
    transport, (reply,) = invite({11: answer})
    assert (reply.site, reply.payload, reply.failure) == ("node 11", None, "bad-seal")
    assert transport.sites == ()


def test_a_site_may_refuse_an_invitation_under_its_seal() -> None:
    transport, (reply,) = invite({11: signs(Refusal("session", "backbone-differs"), "amy")})
    assert (reply.failure, reply.sealed) == ("backbone-differs", "amy")
    assert transport.sites == ()


def test_a_good_seal_is_no_way_around_the_roster_or_into_a_taken_name() -> None:
    bob = signs(PlanReply("session", "bob"), "bob")
    nodes = {11: signs(AMY, "amy"), 12: signs(AMY, "amy"), 13: bob}
    transport, replies = invite(nodes, members=("amy",))
    assert failures(replies) == [("amy", ""), ("amy", "name-taken"), ("bob", "not-in-roster")]
    assert transport.sites == ("amy",)


def test_where_replies_are_not_signed_nobody_is_named_as_a_signer() -> None:
    clock = Clock()
    grid = ScriptedGrid({11: says(AMY)})
    transport = Transport(grid, clock=clock, pause=clock.pause)
    (reply,) = transport.invite(PLAN, 5.0)
    assert (reply.site, reply.failure, reply.sealed) == ("amy", "", None)
