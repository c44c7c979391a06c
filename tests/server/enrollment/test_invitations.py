"""Who takes part: sites that agree, by a name that is theirs alone."""

from dataclasses import replace

import pytest
from support.scripted_grid import (
    PLAN,
    TRAIN,
    TRAINED,
    Clock,
    ScriptedGrid,
    failures,
    invited,
    says,
    silent,
    site,
)

from fedgraft.common.messages.codec import Stage
from fedgraft.common.messages.payloads import PlanReply, Refusal, TrainReply
from fedgraft.server.protocol.transport import Transport


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


def test_a_site_that_was_away_is_asked_again_though_enough_others_are_there() -> None:
    transport, _, grid = invited({11: site("amy"), 12: site("bob")})
    away = grid.nodes.pop(11)
    list(transport.invite(PLAN, 5.0, again=False))
    assert transport.sites == ("bob",)
    grid.nodes[11] = away
    assert failures(list(transport.invite(PLAN, 5.0, again=False))) == [("amy", "")]


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
