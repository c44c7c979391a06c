"""Checks that few attacks reach: types, sizes, small sums, who is blamed, every byte of a key."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from secagg.cheats import at, lie, openings, wiped
from secagg.federation import MODEL, Federation, parameters_for, refused

from fedgraft.common.secagg import transcript as t
from fedgraft.common.secagg.errors import ParameterError, StatementError, TooFewParties, UnmaskError
from fedgraft.common.secagg.keys import derive, seal
from fedgraft.common.secagg.quantize import LANES, Coding, add_packed, pack
from fedgraft.common.secagg.statements import Delivery, Envelope, Opening, RevealedShare
from fedgraft.common.secagg.transcript import Policy, Roster


@pytest.fixture
def five() -> Federation:
    return Federation(5)


def test_a_negative_id_is_not_the_last_site(five: Federation) -> None:
    with pytest.raises(ParameterError):
        five.open_site(0, site=-1, identity=five.identities[4])


def test_hashes_are_bytes(five: Federation) -> None:
    request = dataclasses.replace(at(five, "keys"), context="0" * 32)
    wiped(five.sites[0], refused(five.sites[0].advertise, request), StatementError)
    box = at(five, "train")[0]
    wiped(five.sites[0], refused(five.sites[0].accept, box, "0" * 32), StatementError)


def test_an_authentic_share_of_another_size_is_refused(five: Federation) -> None:
    """A neighbour that seals 63 bytes would have us reveal a share that nobody can use."""
    box = at(five, "train")[0]
    now = five.sites[1]._round
    mine = five.sites[0]._round
    assert now is not None and mine is not None
    key = mine.open_keys[1]
    for size in (0, 63, 65):
        short = Envelope(1, 0, seal(key, bytes(size), mine.advertised_hash))
        rest = [e for e in box.envelopes if e.sender != 1]
        error = refused(five.sites[0].accept, Delivery((short, *rest)), MODEL)
        wiped(five.sites[0], error, StatementError)
        assert error.culprits == (1,)
        five.__post_init__()
        box = at(five, "train")[0]
        mine = five.sites[0]._round
        assert mine is not None
        key = mine.open_keys[1]


def test_a_roster_has_a_shamir_point_for_every_site() -> None:
    keys = tuple(number.to_bytes(32, "big") for number in range(65536))
    assert len(Roster(keys[1:]).keys) == 65535
    with pytest.raises(ParameterError):
        Roster(keys)


def test_signatures_are_bytes_and_nothing_like_them(five: Federation) -> None:
    request = at(five, "shares")
    first, second, *rest = request.advertisements
    now = five.sites[0]._round
    assert now is not None
    likes: tuple[Any, ...] = (bytearray(second.signature), "0" * 64, None)
    for like in likes:
        bent = dataclasses.replace(second, signature=like)
        with pytest.raises(StatementError):
            t.check_advertisements((first, bent, *rest), now.frame, five.roster, range(5))
    server = five.open_server(2)
    survivors = five.advance(server, "keys", until="confirm")
    good = five.sites[1].confirm(survivors)
    others: tuple[Any, ...] = (bytearray(good.signature), "0" * 64, None)
    for like in others:
        bad: Any = dataclasses.replace(good, signature=like)
        assert refused(server.add_confirmation, bad).culprits == (1,)


def test_an_input_s_signature_is_bytes_and_an_envelope_s_sender_an_integer(
    five: Federation,
) -> None:
    server = five.open_server()
    request = five.advance(server, "keys", until="shares")
    sealed = five.sites[1].share(request)
    likes: tuple[Any, ...] = (1.0, True)
    for like in likes:
        envelopes = (dataclasses.replace(sealed.envelopes[0], sender=like), *sealed.envelopes[1:])
        error = refused(server.add_shares, dataclasses.replace(sealed, envelopes=envelopes))
        assert isinstance(error, StatementError)
    server.add_shares(sealed)
    for site in (0, 2, 3, 4):
        server.add_shares(five.sites[site].share(request))
    boxes = server.close_shares()
    five.sites[1].accept(boxes[1], MODEL)
    masked = five.contribute(1)
    bad = dataclasses.replace(masked, signature=bytearray(masked.signature))
    assert isinstance(refused(server.add_masked, bad), StatementError)
    server.add_masked(masked)


def test_the_coordinator_holds_the_policys_minimum_too() -> None:
    federation = Federation(5, policy=Policy(1, 5, 16, 1.0))
    server = federation.open_server()
    request = federation.do_keys(server)
    assert isinstance(refused(federation.do_shares, server, request, [1]), TooFewParties)


def test_a_wrong_share_of_a_dropped_site_is_found_by_its_public_key() -> None:
    """Who lies about that one share alone is no suspect before."""
    federation = Federation(7)
    server, replies = openings(federation, {"train": [6]})
    first = replies[0]
    shares = [RevealedShare(6, bytes(32)) if share.owner == 6 else share for share in first.shares]
    for opening in (Opening(first.site, tuple(shares)), *replies[1:]):
        server.add_opening(opening)
    result = server.finish()
    federation.check(result)
    assert result.disputes == ((6, 0),)


def test_weights_that_sum_to_less_than_one_each_give_no_sum(five: Federation) -> None:
    server = five.open_server()
    boxes = five.advance(server, "keys", until="train")
    for site in range(5):
        five.sites[site].accept(boxes[site], MODEL)
        masked = five.contribute(site)
        if site == 1:
            total = np.zeros(LANES + 5, np.uint32)
            add_packed(total, masked.packed, 24)
            total[1:2] += np.uint32((4 - sum(five.weights.values())) % 2**32)
            masked = dataclasses.replace(masked, packed=pack(total, 24))
        server.add_masked(masked)
    request = five.do_confirm(server, server.close_training())
    assert isinstance(refused(five.do_unmask, server, request), UnmaskError)


@pytest.mark.parametrize("liars", [[3, 4, 5], [0, 1, 2]])
def test_nobody_is_blamed_who_may_be_innocent(liars: list[int]) -> None:
    """With few holders left, as many liars as are assumed can spoil an honest owner's shares."""
    federation = Federation(7, parameters=parameters_for(7, 5, colluders=3))
    server, replies = openings(federation, {"confirm": [6]})
    for opening in replies:
        server.add_opening(lie(opening) if opening.site in liars else opening)
    error = refused(server.finish)
    assert isinstance(error, UnmaskError)
    assert error.culprits == ()


def test_every_byte_of_a_secret_decides_the_mask() -> None:
    """Flower regression: masks there come from 32 bits, which can be tried one by one."""
    secret = bytes(range(32))
    seen = {derive(secret, b"info")}
    for place in range(32):
        for bit in (1, 128):
            bent = bytearray(secret)
            bent[place] ^= bit
            seen.add(derive(bent, b"info"))
    assert len(seen) == 65
    assert all(len(key) == 32 for key in seen)


def test_a_coding_that_cannot_divide_is_refused() -> None:
    for clip in (1e-310, 0.0, float("inf"), float("nan")):
        with pytest.raises(ParameterError):
            Coding(3, clip)


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 3, 24, 1.0),
        (1, 2, 24, 1.0),
        (1, 3, 24, 0.0),
        (1, 3, 24, float("nan")),
        (1, 3, 24, float("inf")),
    ],
)
def test_a_policy_that_lets_everything_pass_is_refused(numbers: Any) -> None:
    with pytest.raises(ParameterError):
        Policy(*numbers)
