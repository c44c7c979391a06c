"""Sites that cheat: named where they can be, and never a wrong sum."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from secagg.federation import MODEL, STAGES, Federation, coding_for, parameters_for, refused

from fedgraft.common.secagg.errors import (
    InputRefused,
    PolicyRefused,
    StageError,
    StatementError,
    TooFewParties,
    UnmaskError,
)
from fedgraft.common.secagg.keys import seal
from fedgraft.common.secagg.quantize import LANES, add_packed, pack
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    Envelope,
    Opening,
    RevealedShare,
    SealedShares,
    SecAggStage,
)
from fedgraft.common.secagg.transcript import Frame, Policy, advertisement_body, sign
from fedgraft.server.protocol.unmasking_server import UnmaskingServer


@pytest.fixture
def five() -> Federation:
    return Federation(5)


def test_advertisements_that_are_refused_cost_only_their_sender(five: Federation) -> None:
    server = five.open_server()
    request = server.keys_request()
    good = [five.sites[site].advertise(request) for site in range(5)]
    server.add_advertisement(good[0])

    def signed(site: int, **keys: Any) -> Advertisement:
        bent = dataclasses.replace(good[site], **keys)
        frame = Frame(request.context, request.round, request.model)
        body = advertisement_body(bent)
        return dataclasses.replace(
            bent, signature=sign(five.identities[site], frame, "keys", site, body)
        )

    for bad in (
        good[0],  # again
        dataclasses.replace(good[1], site=2),  # another's id
        dataclasses.replace(good[1], signature=bytes(64)),
        signed(1, mask_key=good[0].mask_key),
        signed(1, seal_key=good[1].mask_key),
        signed(1, mask_key=bytes(32)),  # of small order: its neighbours would have to abort
        signed(1, seal_key=(1).to_bytes(32, "little")),
    ):
        error = refused(server.add_advertisement, bad)
        assert isinstance(error, StatementError)
        assert error.culprits == (bad.site,)
    for advertisement in good[2:]:
        server.add_advertisement(advertisement)
    assert [a.site for a in server.close_keys().advertisements] == [0, 2, 3, 4]


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


@pytest.mark.parametrize(
    "packed",
    [
        np.zeros(10, np.uint8),
        np.zeros(0, np.uint8),
        np.zeros(47, np.int8),
        np.zeros(48, np.uint8),
        np.zeros(47, np.float32),
        np.zeros((47, 1), np.uint8),
        b"x" * 47,
        None,
    ],
)
def test_masked_inputs_of_another_size_or_type_are_refused(five: Federation, packed: Any) -> None:
    server = five.open_server()
    boxes = five.advance(server, "keys", until="train")
    five.sites[2].accept(boxes[2], MODEL)
    bent = dataclasses.replace(five.contribute(2), packed=packed)
    error = refused(server.add_masked, bent)
    assert isinstance(error, StatementError)
    assert error.culprits == (2,)
    survivors = five.do_train(server, boxes, drop=[2])
    five.check(five.do_unmask(server, five.do_confirm(server, survivors)))


def test_another_id_or_a_second_input_is_refused(five: Federation) -> None:
    server = five.open_server()
    request = five.advance(server, "keys", until="shares")
    boxes = five.do_shares(server, request, drop=[4])
    for site in range(4):
        five.sites[site].accept(boxes[site], MODEL)
    inputs = [five.contribute(site) for site in range(4)]
    server.add_masked(inputs[0])
    for bad in (
        inputs[0],
        dataclasses.replace(inputs[1], site=4),
        dataclasses.replace(inputs[1], site=7),
    ):
        assert isinstance(refused(server.add_masked, bad), StatementError)
    for masked in inputs[1:]:
        server.add_masked(masked)
    five.gone = {4}
    five.check(five.do_unmask(server, five.do_confirm(server, server.close_training())))


@pytest.mark.parametrize("lane", range(LANES))
def test_lanes_that_do_not_add_up_give_no_sum(five: Federation, lane: int) -> None:
    """A site that masks correctly but lies about count, weight or zeros."""
    lies = {0: 1, 1: 2**31, 2: 0, 3: 0}
    server = five.open_server()
    boxes = five.advance(server, "keys", until="train")
    for site in range(5):
        five.sites[site].accept(boxes[site], MODEL)
        masked = five.contribute(site)
        if site == 1:
            total = np.zeros(LANES + 5, np.uint32)
            add_packed(total, masked.packed, 24)
            total[lane : lane + 1] += np.uint32(lies.get(lane, 1))
            masked = dataclasses.replace(masked, packed=pack(total, 24))
        server.add_masked(masked)
    request = five.do_confirm(server, server.close_training())
    if lane in (2, 3):  # a metric may be any number in range: that is poisoning, not a wrong sum
        five.do_unmask(server, request)
        return
    assert isinstance(refused(five.do_unmask, server, request), UnmaskError)
    assert server.stage is SecAggStage.OVER
    assert server._total is None


@pytest.mark.parametrize("value", [2**22, -(2**22)])
def test_a_sum_that_honest_sites_cannot_make_is_thrown_away(five: Federation, value: int) -> None:
    server = five.open_server()
    boxes = five.advance(server, "keys", until="train")
    for site in range(5):
        five.sites[site].accept(boxes[site], MODEL)
        masked = five.contribute(site)
        if site == 3:
            total = np.zeros(LANES + 5, np.uint32)
            add_packed(total, masked.packed, 24)
            total[-1:] += np.uint32(value % 2**32)
            masked = dataclasses.replace(masked, packed=pack(total, 24))
        server.add_masked(masked)
    request = five.do_confirm(server, server.close_training())
    assert isinstance(refused(five.do_unmask, server, request), UnmaskError)


@pytest.mark.parametrize(
    ("update", "weight", "metrics"),
    [
        (np.full(5, np.nan), 1, ()),
        (np.full(5, np.inf), 1, ()),
        (np.zeros(5), 1001, ()),
        (np.zeros(5), 0, ()),
        (np.zeros(5), 1, (np.inf,)),
        (np.zeros(4), 1, ()),
        (np.zeros((5, 1)), 1, ()),
    ],
)
def test_an_honest_site_sends_nothing_that_is_out_of_range(
    five: Federation, update: Any, weight: int, metrics: tuple[float, ...]
) -> None:
    boxes = five.advance(five.open_server(), "keys", until="train")
    site = five.sites[0]
    site.accept(boxes[0], MODEL)
    error = refused(site.mask, update, weight, metrics, np.random.default_rng(0))
    assert isinstance(error, InputRefused)
    assert site._round is None


def openings(federation: Federation, drops: dict[str, list[int]]) -> tuple[UnmaskingServer, Any]:
    """A round up to the openings, which a test may bend before it adds them."""
    server = federation.open_server()
    answer: Any = None
    federation.gone = set()
    for stage in ("keys", "shares", "train", "confirm"):
        answer = getattr(federation, f"do_{stage}")(server, answer, drops.get(stage, ()))
    return server, [federation.sites[site].unmask(answer) for site in federation.alive(())]


def lie(opening: Opening) -> Opening:
    return Opening(
        opening.site,
        tuple(
            RevealedShare(share.owner, bytes(b ^ 0x5A for b in share.share))
            for share in opening.shares
        ),
    )


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


def test_a_mask_key_of_small_order_is_blamed_at_the_site_too(five: Federation) -> None:
    """If the coordinator lets it pass, the neighbours do not."""
    boxes = five.advance(five.open_server(), "keys", until="train")
    site = five.sites[0]
    site.accept(boxes[0], MODEL)
    assert site._round is not None
    site._round.mask_keys[3] = bytes(32)
    error = refused(five.contribute, 0)
    assert isinstance(error, StatementError)
    assert error.culprits == (3,)


def test_thresholds_of_the_coordinator() -> None:
    for stage, short in (("keys", 3), ("shares", 3), ("train", 3)):
        federation = Federation(5)
        assert isinstance(refused(federation.run, {stage: range(5 - short, 5)}), TooFewParties) is (
            short < federation.settings.plan.fewest_survivors
        )
    federation = Federation(5, policy=Policy(1, 5, 16, 1.0))
    assert isinstance(refused(federation.run, {"train": [1]}), TooFewParties)
    low = parameters_for(5, 5, coding=coding_for(5, clip=2.0))
    assert isinstance(refused(lambda: federation.open_server(parameters=low)), PolicyRefused)


def test_a_round_that_was_aborted_stays_so(five: Federation) -> None:
    server = five.open_server()
    five.advance(server, "keys", until="train")
    server.abort()
    assert isinstance(refused(server.close_training), StageError)
    five.check(five.run(number=2))


def test_what_comes_out_of_order_changes_nothing() -> None:
    """Every reply at every stage but its own; the round then ends as if it had not come."""
    other, federation = Federation(4), Federation(4)
    late: dict[str, list[Any]] = {}
    answer: Any = None
    server = other.open_server()
    replies = {"keys": "advertise", "shares": "share", "confirm": "confirm", "unmask": "unmask"}
    adds = dict(
        zip(
            STAGES,
            ("add_advertisement", "add_shares", "add_masked", "add_confirmation", "add_opening"),
            strict=True,
        )
    )
    for stage in STAGES:
        request: Any = server.keys_request() if stage == "keys" else answer
        late[stage] = []
        for site in range(4):
            if stage == "train":
                other.sites[site].accept(request[site], MODEL)
                late[stage].append(other.contribute(site))
            else:
                late[stage].append(getattr(other.sites[site], replies[stage])(request))
            getattr(server, adds[stage])(late[stage][-1])
        closes = ("close_keys", "close_shares", "close_training", "close_confirm", "finish")
        answer = getattr(server, closes[STAGES.index(stage)])()

    server, answer = federation.open_server(), None
    for stage in (*STAGES, ""):
        for wrong in STAGES:
            if wrong != stage:
                assert isinstance(refused(getattr(server, adds[wrong]), late[wrong][0]), StageError)
        if stage != "keys":
            assert isinstance(refused(server.keys_request), StageError)
            assert isinstance(refused(server.close_keys), StageError)
        if stage:
            answer = getattr(federation, f"do_{stage}")(server, answer)
    federation.check(answer)


def test_a_site_cannot_change_its_keys(five: Federation) -> None:
    server = five.open_server()
    request = server.keys_request()
    for _ in range(2):
        advertisement = five.open_site(1, claim=lambda *now: None).advertise(request)
        if server._advertised:
            error = refused(server.add_advertisement, advertisement)
            assert isinstance(error, StatementError)
            assert error.culprits == (1,)
        else:
            server.add_advertisement(advertisement)


def test_too_few_sharers_end_the_round_before_anyone_trains(five: Federation) -> None:
    server = five.open_server()
    request = five.advance(server, "keys", until="shares")
    assert isinstance(refused(five.do_shares, server, request, [0, 1]), TooFewParties)
    assert server.stage is SecAggStage.OVER
    assert server._boxes == {}


def test_an_id_is_an_integer_and_nothing_that_equals_one(five: Federation) -> None:
    server = five.open_server()
    boxes = five.advance(server, "keys", until="train")
    five.sites[1].accept(boxes[1], MODEL)
    masked = five.contribute(1)
    for site in (True, 1.0):
        bad = dataclasses.replace(masked, site=site)
        assert isinstance(refused(server.add_masked, bad), StatementError)
    for envelope in boxes[0].envelopes[:1]:
        bent = dataclasses.replace(envelope, sender=True)
        assert isinstance(refused(five.sites[0].accept, Delivery((bent,)), MODEL), StatementError)


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
