"""A coordinator that cheats about who is in the sum: it ends before anything is revealed.

Two are attacks that worked on Flower 1.41's SecAgg+ (flwrlabs/flower#7522 and two more): seeds of
32 bits, both share kinds for one peer.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from secagg.cheats import at, wiped
from secagg.federation import (
    MODEL,
    Federation,
    among,
    coding_for,
    parameters_for,
    refused,
    unsigned,
)
from support.matrix import thinned

from fedgraft.common.secagg.errors import (
    ParameterError,
    PolicyRefused,
    SecAggError,
    StageError,
    StatementError,
    TooFewParties,
)
from fedgraft.common.secagg.statements import (
    Confirmation,
    Delivery,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.common.secagg.transcript import Frame, Policy, sign


@pytest.fixture
def five() -> Federation:
    return Federation(5)


# --- CONFIRM ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shared", "masked", "kind"),
    [
        ((0, 1, 2, 3, 4), (1, 2, 3, 4), StatementError),  # without us
        ((0, 1, 2, 3), (0, 1, 2, 3, 4), StatementError),  # U3 not in U2
        ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4), StatementError),  # U2 not in U1
        ((0, 1, 2, 3), (0, 1, 2, 3), StatementError),  # not the shares we hold
        ((0, 1, 2, 3, 4), (0, 1, 2), TooFewParties),
        ((0, 1, 2, 3, 4), (0,), TooFewParties),
        ((0, 1, 2, 3, 4), (3, 2, 1, 0), StatementError),
        ((0, 1, 2, 3, 4), (0, 0, 1, 2, 3), StatementError),
    ],
)
def test_survivor_sets_that_are_not_signed(
    five: Federation, shared: Any, masked: Any, kind: type[SecAggError]
) -> None:
    at(five, "confirm")
    error = refused(five.sites[0].confirm, unsigned(shared, masked))
    wiped(five.sites[0], error, kind)


def test_survivors_that_all_have_signed_are_looked_at_all_the_same(five: Federation) -> None:
    survivors = at(five, "confirm")
    for bent in (
        among(survivors, (1, 2, 3, 4)),  # without us
        dataclasses.replace(survivors, shared=(0, 1, 2, 3, 4, 5)),  # U2 not in U1
        dataclasses.replace(survivors, signatures=(*survivors.signatures, b"")),
        dataclasses.replace(
            survivors, signatures=tuple(bytearray(one) for one in survivors.signatures)
        ),
    ):
        site = five.open_site(0, memory=five.sites[0].remember(), claim=lambda *_: None)
        wiped(site, refused(site.confirm, bent), StatementError)
    five.sites[0].confirm(survivors)


def test_the_policys_minimum_counts_survivors_too() -> None:
    federation = Federation(5, policy=Policy(1, 5, 16, 1.0))
    at(federation, "confirm")
    error = refused(federation.sites[0].confirm, unsigned((0, 1, 2, 3, 4), (0, 1, 2, 3)))
    wiped(federation.sites[0], error, TooFewParties)


def test_enough_honest_survivors_are_asked_for_even_when_signatures_are_fewer() -> None:
    """T + 2 survivors: one honest site alone among colluders would be laid bare."""
    parameters = parameters_for(6, 5, colluders=3)
    federation = Federation(6, parameters=parameters)
    assert parameters.plan.fewest_survivors == 5
    at(federation, "confirm")
    everyone = (0, 1, 2, 3, 4, 5)
    error = refused(federation.sites[0].confirm, unsigned(everyone, (0, 1, 2, 3)))
    wiped(federation.sites[0], error, TooFewParties)


def test_a_second_survivor_set_is_never_signed(five: Federation) -> None:
    survivors = at(five, "confirm")
    five.sites[0].confirm(survivors)
    other = among(survivors, survivors.masked[:-1])
    wiped(five.sites[0], refused(five.sites[0].confirm, other), StageError)


def test_the_same_work_is_never_summed_over_other_sites(five: Federation) -> None:
    """The difference of the two sums would be the update of the site that was left out."""
    five.check(five.run())
    again = five.open_server(2, model=MODEL)
    survivors = five.advance(again, "keys", until="confirm")
    fewer = among(survivors, (0, 1, 2, 3))
    wiped(five.sites[0], refused(five.sites[0].confirm, fewer), StageError)


def test_the_same_work_may_be_summed_again_over_the_same_sites(five: Federation) -> None:
    """As after a crash of the coordinator."""
    first = five.run()
    again = five.open_server(2, model=MODEL)
    answer = five.advance(again, "keys")
    np.testing.assert_array_equal(first.sums, answer.sums)


@pytest.mark.parametrize(("n", "colluders"), thinned([(5, 2), (6, 3), (10, 3), (150, 15)], 2))
def test_shares_withheld_from_one_site_leave_its_input_closed(n: int, colluders: int) -> None:
    """One site is shown only shares of sites that collude or will be said to have dropped.

    It then shares no mask with anyone else, and its own would be opened by all the others. But
    what it was given stands in its signature, and its honest neighbours do not confirm.
    """
    coding = coding_for(n, ring_bits=32)
    parameters = parameters_for(n, 5, colluders=colluders, coding=coding)
    federation = Federation(n, parameters=parameters)
    server = federation.open_server()
    boxes = federation.advance(server, "keys", until="train")
    victim = federation.sites[0]
    few = server._plan.share_threshold - 1
    withheld = set(server._graph.neighbours(0)) - {e.sender for e in boxes[0].envelopes[:few]}
    assert withheld
    victim.accept(Delivery(boxes[0].envelopes[:few]), MODEL)
    masked = federation.contribute(0)
    assert isinstance(refused(server.add_masked, masked), StatementError)
    # A coordinator that cheats goes on all the same.
    server._masked[0] = masked.signature
    for site in range(1, n):
        federation.sites[site].accept(boxes[site], MODEL)
        server.add_masked(federation.contribute(site))
    survivors = server.close_training()
    wiped(victim, refused(victim.confirm, survivors), StatementError)
    for neighbour in server._graph.neighbours(0):
        error = refused(federation.sites[neighbour].confirm, survivors)
        wiped(federation.sites[neighbour], error, StatementError)
        assert error.culprits == (0,)


def test_memory_of_other_parameters_is_refused(five: Federation) -> None:
    at(five, "confirm")
    memory = five.sites[0].remember()
    weaker = parameters_for(5, 5, colluders=2)
    with pytest.raises(ParameterError):
        five.open_site(0, parameters=weaker, memory=memory)


def test_nothing_is_remembered_between_accepting_and_masking(five: Federation) -> None:
    """Two copies would mask two inputs alike, and their difference is not masked at all."""
    box = at(five, "train")[0]
    five.sites[0].accept(box, MODEL)
    with pytest.raises(StageError):
        five.sites[0].remember()


# --- UNMASK -------------------------------------------------------------------------------------
def test_no_site_ever_gives_both_kinds_of_share(five: Federation) -> None:
    """Flower regression: one request for the seed's share, one for the key's."""
    request = at(five, "unmask")
    site = five.sites[0]
    opening = site.unmask(request)
    assert sorted(share.owner for share in opening.shares) == [0, 1, 2, 3, 4]
    assert {len(share.share) for share in opening.shares} == {32}
    wiped(site, refused(site.unmask, request), StageError)
    survivors = unsigned((0, 1, 2, 3, 4), (0, 1, 2, 3))
    wiped(site, refused(site.confirm, survivors), StageError)


def test_a_split_view_of_survivors_is_not_unmasked(five: Federation) -> None:
    """Two survivor sets, each signed by those that were shown it: neither reaches t_sig."""
    server = five.open_server()
    survivors = five.advance(server, "keys", until="confirm")
    views = [among(survivors, (0, 1, 2, 3)), among(survivors, (0, 1, 2, 4))]
    signed = [five.sites[site].confirm(views[site > 1 and site == 4]) for site in (0, 1, 2, 3, 4)]
    wiped(
        five.sites[4], refused(five.sites[4].unmask, UnmaskRequest(tuple(signed))), StatementError
    )
    few = UnmaskRequest(tuple(signed[:3]))
    wiped(five.sites[0], refused(five.sites[0].unmask, few), TooFewParties)


@pytest.mark.parametrize("how", ["too few", "twice", "outsider", "forged", "replayed"])
def test_confirmations_that_do_not_count(five: Federation, how: str) -> None:
    server = five.open_server()
    survivors = five.advance(server, "keys", until="confirm")
    good = [five.sites[site].confirm(survivors) for site in range(5)]
    kind: type[SecAggError] = StatementError
    match how:
        case "too few":
            bad, kind = good[:3], TooFewParties
        case "twice":
            bad = [*good[:3], good[0]]
        case "outsider":
            bad = [*good[:3], Confirmation(9, good[3].signature)]
        case "forged":
            bad = [*good[:3], Confirmation(3, good[2].signature)]
        case _:
            frame = Frame(five.open_server().keys_request().context, 9, MODEL)
            old = sign(five.identities[3], frame, "confirm", 3, bytes(32))
            bad = [*good[:3], Confirmation(3, old)]
    error = refused(five.sites[0].unmask, UnmaskRequest(tuple(bad)))
    wiped(five.sites[0], error, kind)


def test_masks_come_from_256_bits_that_a_colluder_does_not_have(five: Federation) -> None:
    """Flower regression: a mask from a 32-bit seed falls to search once a colluder knows one."""
    drawn: list[int] = []

    def entropy(size: int) -> bytes:
        drawn.append(size)
        return bytes([len(drawn)]) * size

    site = five.open_site(0, entropy=entropy)
    site.advertise(five.open_server().keys_request())
    assert drawn == [32, 32, 32]  # seed, mask key, sealing key


def test_nothing_works_out_of_order(five: Federation) -> None:
    requests = {
        "share": (SharesRequest(()),),
        "accept": (Delivery(()), MODEL),
        "mask": (np.zeros(5), 1, (), np.random.default_rng(0)),
        "confirm": (Survivors((), (), ()),),
        "unmask": (UnmaskRequest(()),),
    }
    for name, arguments in requests.items():
        for begun in (False, True):
            site = Federation(5).sites[0]
            if begun and name != "share":
                site.advertise(at(five, "keys"))
            wiped(site, refused(getattr(site, name), *arguments), StageError)


def test_a_new_round_wipes_the_one_before(five: Federation) -> None:
    at(five, "confirm")
    site = five.sites[0]
    before = site._round
    assert before is not None
    held = list(before.held.values())
    site.advertise(five.open_server(2).keys_request())
    assert all(share == bytes(64) for share in held)
    assert before.held == {}


def test_another_session_is_another_context(five: Federation) -> None:
    request = five.open_server(parameters=parameters_for(5, 5, session=bytes(16))).keys_request()
    wiped(five.sites[0], refused(five.sites[0].advertise, request), PolicyRefused)
