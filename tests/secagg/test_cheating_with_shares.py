"""Sites that cheat with shares: named where they can be, and never a wrong sum."""

import dataclasses
from typing import Any

import pytest
from secagg.cheats import lie, openings
from secagg.federation import MODEL, Federation, refused

from fedgraft.common.secagg.errors import StageError, StatementError, TooFewParties, UnmaskError
from fedgraft.common.secagg.keys import seal
from fedgraft.common.secagg.statements import (
    Confirmation,
    Envelope,
    Opening,
    RevealedShare,
    SealedShares,
)


@pytest.fixture
def five() -> Federation:
    return Federation(5)


def bend_shares(good: SealedShares, how: str) -> SealedShares:
    first, *rest = good.envelopes
    envelopes: list[Any]
    match how:
        case "one missing":
            envelopes = rest
        case "one twice":
            envelopes = [first, *good.envelopes]
        case "for nobody":
            envelopes = [dataclasses.replace(first, recipient=99), *rest]
        case "for no number":
            envelopes = [dataclasses.replace(first, recipient="1"), *rest]  # type: ignore[arg-type]
        case "wrong size":
            envelopes = [dataclasses.replace(first, ciphertext=bytes(79)), *rest]
        case _:
            envelopes = [dataclasses.replace(first, sender=4), *rest]
    return SealedShares(good.site, tuple(envelopes))


@pytest.mark.parametrize(
    "how",
    ["one missing", "one twice", "for nobody", "for no number", "wrong size", "another sender"],
)
def test_envelopes_that_are_refused_cost_only_their_sender(five: Federation, how: str) -> None:
    server = five.open_server()
    request = five.advance(server, "keys", until="shares")
    good = five.sites[0].share(request)
    error = refused(server.add_shares, bend_shares(good, how))
    assert isinstance(error, StatementError)
    assert error.culprits == (0,)
    boxes = five.do_shares(server, request, drop=[0])
    assert sorted(boxes) == [1, 2, 3, 4]
    assert isinstance(refused(server.add_shares, good), StageError)


def test_who_shares_twice_or_is_unknown_is_refused(five: Federation) -> None:
    server = five.open_server()
    good = five.sites[0].share(five.advance(server, "keys", until="shares"))
    server.add_shares(good)
    assert isinstance(refused(server.add_shares, good), StatementError)
    for site in (9, "0", None):
        stranger = SealedShares(site, good.envelopes)  # type: ignore[arg-type]
        assert isinstance(refused(server.add_shares, stranger), StatementError)


def test_a_garbage_envelope_is_blamed_on_its_sender(five: Federation) -> None:
    server = five.open_server()
    request = five.advance(server, "keys", until="shares")
    for site in range(5):
        shares = five.sites[site].share(request)
        if site == 2:
            envelopes = tuple(
                dataclasses.replace(e, ciphertext=bytes(80)) for e in shares.envelopes
            )
            shares = SealedShares(2, envelopes)
        server.add_shares(shares)
    boxes = server.close_shares()
    for site in (0, 1, 3, 4):
        error = refused(five.sites[site].accept, boxes[site], MODEL)
        assert isinstance(error, StatementError)
        assert error.culprits == (2,)
    assert isinstance(refused(server.close_training), TooFewParties)


@pytest.mark.parametrize("liars", [[0], [3], [0, 1], [2, 5], [4, 5]])
@pytest.mark.parametrize("dropped", [[], [6]])
def test_wrong_shares_are_made_up_for_and_named(liars: list[int], dropped: list[int]) -> None:
    federation = Federation(7)
    server, replies = openings(federation, {"train": dropped})
    for opening in replies:
        server.add_opening(lie(opening) if opening.site in liars else opening)
    result = server.finish()
    federation.check(result)
    needed = min(liars) < 4  # the first four open everything; were they right, none is judged
    found = {holder for _, holder in result.disputes}
    assert found == (set(liars) if needed else set())


def test_too_many_wrong_shares_give_no_sum() -> None:
    federation = Federation(7)
    server, replies = openings(federation, {})
    for opening in replies:
        server.add_opening(lie(opening) if opening.site < 4 else opening)
    error = refused(server.finish)
    assert isinstance(error, UnmaskError)
    assert error.culprits == (0,)
    assert server._total is None
    assert isinstance(refused(server.finish), StageError)


def test_openings_that_are_refused(five: Federation) -> None:
    server, replies = openings(five, {"confirm": [4]})
    first, second = replies[0], replies[1]
    shares = first.shares
    server.add_opening(second)
    for bad in (
        second,
        Opening(0, shares[1:]),
        Opening(0, (*shares, shares[0])),
        Opening(0, (RevealedShare(0, bytes(31)), *shares[1:])),
        Opening(0, (RevealedShare(9, bytes(32)), *shares[1:])),
        Opening(4, shares),  # did not confirm
        Opening(9, shares),
        Opening("0", shares),  # type: ignore[arg-type]
    ):
        assert isinstance(refused(server.add_opening, bad), StatementError)
    assert isinstance(refused(server.finish), TooFewParties)


def test_confirmations_that_are_refused(five: Federation) -> None:
    server = five.open_server()
    survivors = five.advance(server, "keys", until="confirm")
    good = [five.sites[site].confirm(survivors) for site in range(5)]
    server.add_confirmation(good[0])
    for bad in (good[0], Confirmation(1, good[2].signature), Confirmation(9, good[1].signature)):
        assert isinstance(refused(server.add_confirmation, bad), StatementError)
    assert isinstance(refused(server.close_confirm), TooFewParties)
    assert isinstance(refused(server.add_confirmation, good[1]), StageError)


def test_a_dealer_of_inconsistent_shares_gets_no_sum_and_is_named(five: Federation) -> None:
    """Site 1 seals authentic envelopes whose shares are not of what it advertised."""
    server = five.open_server()
    request = five.advance(server, "keys", until="shares")
    for site in range(5):
        party = five.sites[site]
        shares = party.share(request)
        if site == 1:
            shares = SealedShares(1, tuple(garbled(five, request, other) for other in (0, 2, 3, 4)))
        server.add_shares(shares)
    boxes = server.close_shares()
    survivors = five.do_train(server, boxes)
    error = refused(five.do_unmask, server, five.do_confirm(server, survivors))
    assert isinstance(error, UnmaskError)
    assert error.culprits == (1,)


def garbled(federation: Federation, request: Any, other: int) -> Envelope:
    from fedgraft.common.secagg.keys import derive
    from fedgraft.common.secagg.transcript import hash_advertisements, seal_info

    now = federation.sites[1]._round
    assert now is not None
    found = {a.site: a for a in request.advertisements}
    advertised = hash_advertisements(now.frame, found)
    agreed = now.seal_pair.agree(found[other].seal_key)
    key = derive(agreed, seal_info(now.frame, advertised, 1, other))
    return Envelope(1, other, seal(key, bytes([other]) * 64, advertised))


def test_the_server_keeps_no_share_after_the_round(five: Federation) -> None:
    server, replies = openings(five, {})
    for opening in replies:
        server.add_opening(opening)
    assert server._boxes == {}
    server.finish()
    assert server._openings == {}
    server, replies = openings(Federation(5), {})
    server.add_opening(replies[0])
    server.abort()
    assert server._openings == {}
