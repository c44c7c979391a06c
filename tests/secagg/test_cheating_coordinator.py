"""A coordinator that cheats with keys, models and envelopes: it ends before anything is revealed.

Unsigned keys are an attack that worked on Flower 1.41's SecAgg+, one of three: two are in
``test_cheating_with_survivors.py`` (flwrlabs/flower#7522 and two more).
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from secagg.cheats import at, wiped
from secagg.federation import MODEL, STAGES, Federation, coding_for, parameters_for, refused

from fedgraft.client.secagg.round_secrets import PartyState
from fedgraft.common.secagg.errors import (
    ParameterError,
    PolicyRefused,
    StageError,
    StatementError,
    TooFewParties,
)
from fedgraft.common.secagg.keys import Exchange, Identity
from fedgraft.common.secagg.statements import (
    Advertisement,
    Delivery,
    Envelope,
    KeysRequest,
    SecAggStage,
    SharesRequest,
)
from fedgraft.common.secagg.transcript import (
    Frame,
    Policy,
    advertisement_body,
    context_hash,
    hash_adapter,
    hash_model,
    sign,
)


@pytest.fixture
def five() -> Federation:
    return Federation(5)


# --- KEYS ---------------------------------------------------------------------------------------
def test_a_round_is_served_once_also_after_a_restart(five: Federation) -> None:
    request = dataclasses.replace(at(five, "keys"), round=4)
    site = five.sites[0]
    site.advertise(request)
    assert five.claims == {0: (4, SecAggStage.KEYS)}
    for number in (4, 3, 0, -1):
        error = refused(site.advertise, dataclasses.replace(request, round=number))
        wiped(site, error, StageError)
        again = five.open_site(0)
        wiped(again, refused(again.advertise, request), StageError)
    site.advertise(dataclasses.replace(request, round=5))


def test_the_round_is_stored_before_it_is_answered(five: Federation) -> None:
    def fail(*_: int) -> None:
        raise OSError("disk full")

    site = five.open_site(0, claim=fail)
    with pytest.raises(OSError):
        site.advertise(at(five, "keys"))
    assert site.state is PartyState.IDLE


@pytest.mark.parametrize("stage", STAGES[1:])
def test_no_stage_is_served_twice_from_a_copy_of_the_site_s_memory(
    five: Federation, stage: str
) -> None:
    """Two messages at once, or memory brought back: two survivor sets would open a single input."""
    server = five.open_server()
    request = five.advance(server, "keys", until=stage)
    memory = five.sites[0].remember()
    copies = [five.open_site(0, memory=memory) for _ in range(2)]
    serve = {"shares": "share", "train": "accept", "confirm": "confirm", "unmask": "unmask"}[stage]
    arguments = (request[0], MODEL) if stage == "train" else (request,)
    getattr(copies[0], serve)(*arguments)
    wiped(copies[1], refused(getattr(copies[1], serve), *arguments), StageError)


def test_a_site_restarted_in_a_round_abstains_from_it(five: Federation) -> None:
    request = at(five, "shares")
    site = five.open_site(0)
    wiped(site, refused(site.share, request), StageError)
    site.advertise(KeysRequest(2, five.open_server().keys_request().context, MODEL))


@pytest.mark.parametrize(
    "change",
    [
        {"context": bytes(32)},
        {"context": b""},
        {"model": b"short"},
        {"round": 2**63},
        {"round": "1"},
    ],
)
def test_a_malformed_or_foreign_request_is_refused(five: Federation, change: Any) -> None:
    site = five.sites[0]
    error = refused(site.advertise, dataclasses.replace(at(five, "keys"), **change))
    assert isinstance(error, PolicyRefused | StatementError)
    assert site.state is PartyState.IDLE
    assert five.claims == {}


@pytest.mark.parametrize(
    "downgrade",
    [
        {"coding": coding_for(5, clip=0.9)},
        {"coding": coding_for(5, ring_bits=16, value_bits=8)},
        {"session": bytes(16)},
        {"layout": bytes(32)},
        {"length": 4},
        {"dropouts": 1},
        {"cohort": (0, 1, 2)},
        {"colluders": 2},
    ],
)
def test_parameters_are_those_of_the_site(five: Federation, downgrade: Any) -> None:
    """The coordinator's context must be the site's own, computed from its own parameters."""
    other = parameters_for(5, 5, **downgrade)
    request = five.open_server(parameters=other).keys_request()
    wiped(five.sites[0], refused(five.sites[0].advertise, request), PolicyRefused)


@pytest.mark.parametrize(
    "policy",
    [Policy(2, 3, 16, 1.0), Policy(1, 6, 16, 1.0), Policy(1, 3, 32, 1.0), Policy(1, 3, 16, 0.1)],
)
def test_the_policy_floor_holds_whatever_was_agreed(five: Federation, policy: Policy) -> None:
    site = five.open_site(0, policy=policy)
    context = context_hash(five.settings, five.roster, policy)
    wiped(site, refused(site.advertise, KeysRequest(1, context, MODEL)), PolicyRefused)


def test_a_site_outside_the_cohort_takes_no_part() -> None:
    federation = Federation(5, parameters=parameters_for(4, 5, cohort=(0, 1, 2, 3)))
    site = federation.open_site(4)
    wiped(site, refused(site.advertise, at(federation, "keys")), PolicyRefused)


def test_the_roster_must_hold_this_sites_key(five: Federation) -> None:
    for changes in ({"site": 1}, {"site": 5}, {"site": -1}, {"identity": Identity.generate()}):
        with pytest.raises(ParameterError):
            five.open_site(0, **changes)


# --- SHARES -------------------------------------------------------------------------------------
def forge(federation: Federation, site: int, identity: Identity, number: int = 1) -> Advertisement:
    """Keys of the coordinator's own, in a site's name."""
    frame = Frame(federation.open_server().keys_request().context, number, MODEL)
    keys = (Exchange.generate().public, Exchange.generate().public, bytes(32))
    body = advertisement_body(Advertisement(site, *keys, signature=b""))
    return Advertisement(site, *keys, signature=sign(identity, frame, "keys", site, body))


def test_unsigned_neighbours_are_refused(five: Federation) -> None:
    """Flower regression: a server that plays all neighbours learns the update."""
    request = at(five, "shares")
    mine = request.advertisements[0]
    fakes = [forge(five, site, Identity.generate()) for site in range(1, 5)]
    error = refused(five.sites[0].share, SharesRequest((mine, *fakes)))
    wiped(five.sites[0], error, StatementError)
    assert error.culprits == (1,)


def test_sybils_outside_the_roster_are_refused(five: Federation) -> None:
    request = at(five, "shares")
    sybil = dataclasses.replace(forge(five, 1, five.identities[1]), site=5)
    error = refused(five.sites[0].share, SharesRequest((*request.advertisements, sybil)))
    wiped(five.sites[0], error, StatementError)


def test_one_site_cannot_be_shown_twice(five: Federation) -> None:
    advertisements = at(five, "shares").advertisements
    twice = (*advertisements, forge(five, 1, five.identities[1]))
    wiped(five.sites[0], refused(five.sites[0].share, SharesRequest(twice)), StatementError)


def test_keys_of_an_earlier_round_are_refused(five: Federation) -> None:
    request = at(five, "shares")
    old = request.advertisements
    number = five.open_server(2)
    five.sites[0].advertise(number.keys_request())
    mixed = SharesRequest(old)
    wiped(five.sites[0], refused(five.sites[0].share, mixed), StatementError)


def test_our_own_entry_must_be_unchanged(five: Federation) -> None:
    advertisements = at(five, "shares").advertisements
    forged = forge(five, 0, five.identities[0])  # even signed by us, as in a replay of ourselves
    for wrong in ((forged, *advertisements[1:]), advertisements[1:]):
        federation = Federation(5)
        own = federation.open_server()
        federation.sites[0].advertise(own.keys_request())
        error = refused(federation.sites[0].share, SharesRequest(wrong))
        wiped(federation.sites[0], error, StatementError)


def test_repeated_keys_are_refused(five: Federation) -> None:
    advertisements = at(five, "shares").advertisements
    first, second = advertisements[1:3]
    frame = Frame(five.open_server().keys_request().context, 1, MODEL)
    copied = dataclasses.replace(second, mask_key=first.mask_key)
    body = advertisement_body(copied)
    copied = dataclasses.replace(copied, signature=sign(five.identities[2], frame, "keys", 2, body))
    wrong = SharesRequest((*advertisements[:2], copied, *advertisements[3:]))
    wiped(five.sites[0], refused(five.sites[0].share, wrong), StatementError)


def test_too_few_advertisements_are_refused(five: Federation) -> None:
    advertisements = at(five, "shares").advertisements
    error = refused(five.sites[0].share, SharesRequest(advertisements[:3]))
    wiped(five.sites[0], error, TooFewParties)


def test_sites_with_different_models_never_share_a_round(five: Federation) -> None:
    server = five.open_server()
    other = hash_model(hash_adapter(np.zeros(3, np.float32)), b"settings")
    request = server.keys_request()
    advertisements = [
        five.sites[site].advertise(request if site else dataclasses.replace(request, model=other))
        for site in range(5)
    ]
    assert isinstance(refused(server.add_advertisement, advertisements[0]), StatementError)
    error = refused(five.sites[1].share, SharesRequest(tuple(advertisements)))
    wiped(five.sites[1], error, StatementError)


def test_a_neighbours_sealing_key_of_small_order_is_refused(five: Federation) -> None:
    advertisements = at(five, "shares").advertisements
    frame = Frame(five.open_server().keys_request().context, 1, MODEL)
    small = dataclasses.replace(advertisements[1], seal_key=bytes(32))
    signature = sign(five.identities[1], frame, "keys", 1, advertisement_body(small))
    small = dataclasses.replace(small, signature=signature)
    wrong = SharesRequest((advertisements[0], small, *advertisements[2:]))
    error = refused(five.sites[0].share, wrong)
    wiped(five.sites[0], error, StatementError)
    assert error.culprits == (1,)


# --- TRAIN --------------------------------------------------------------------------------------
def test_the_model_that_is_trained_is_the_one_that_was_signed(five: Federation) -> None:
    box = at(five, "train")[0]
    for model in (bytes(32), b""):
        error = refused(five.sites[0].accept, box, model)
        wiped(five.sites[0], error, StatementError)
        five = Federation(5)
        box = at(five, "train")[0]


def bend(box: Delivery, how: str) -> Delivery:
    first, *rest = box.envelopes
    match how:
        case "changed":
            flipped = bytes([first.ciphertext[0] ^ 1]) + first.ciphertext[1:]
            bent = [dataclasses.replace(first, ciphertext=flipped), *rest]
        case "short":
            bent = [dataclasses.replace(first, ciphertext=first.ciphertext[:-1]), *rest]
        case "rerouted":
            bent = [dataclasses.replace(first, sender=rest[0].sender), *rest[1:]]
        case "twice":
            bent = [first, first, *rest]
        case "from us":
            bent = [dataclasses.replace(first, sender=first.recipient), *rest]
        case "for another":
            bent = [dataclasses.replace(first, recipient=first.sender), *rest]
        case "unknown":
            bent = [Envelope(77, first.recipient, first.ciphertext), *rest]
        case _:
            bent = [dataclasses.replace(first, sender=None), *rest]  # type: ignore[arg-type]
    return Delivery(tuple(bent))


@pytest.mark.parametrize(
    "how",
    ["changed", "short", "rerouted", "twice", "from us", "for another", "unknown", "no sender"],
)
def test_changed_routing_is_refused(five: Federation, how: str) -> None:
    box = bend(at(five, "train")[0], how)
    wiped(five.sites[0], refused(five.sites[0].accept, box, MODEL), StatementError)


def test_another_view_of_the_advertisements_opens_nothing(five: Federation) -> None:
    """Split view in SHARES: each half is valid, but the seals do not fit across."""
    server = five.open_server()
    request = server.keys_request()
    everyone = tuple(five.sites[site].advertise(request) for site in range(5))
    for site in (0, 1):
        shares = five.sites[site].share(SharesRequest(everyone[: 5 if site else 4]))
        if site == 0:
            to_one = next(e for e in shares.envelopes if e.recipient == 1)
    error = refused(five.sites[1].accept, Delivery((to_one,)), MODEL)
    wiped(five.sites[1], error, StatementError)
    assert error.culprits == (0,)


def test_too_few_envelopes_are_refused(five: Federation) -> None:
    box = at(five, "train")[0]
    error = refused(five.sites[0].accept, Delivery(box.envelopes[:1]), MODEL)
    wiped(five.sites[0], error, TooFewParties)
