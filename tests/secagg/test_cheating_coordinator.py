"""A coordinator that cheats: every attack ends at an honest site, before anything is revealed.

Three are attacks that worked on Flower 1.41's SecAgg+ (flwrlabs/flower#7522 and two more): seeds
of 32 bits, both share kinds for one peer, unsigned keys.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from secagg.federation import (
    MODEL,
    STAGES,
    Federation,
    among,
    coding_for,
    parameters_for,
    refused,
    unsigned,
)

from fedgraft.client.secagg.masking_party import MaskingParty
from fedgraft.client.secagg.round_secrets import PartyState
from fedgraft.common.secagg.errors import (
    ParameterError,
    PolicyRefused,
    SecAggError,
    StageError,
    StatementError,
    TooFewParties,
)
from fedgraft.common.secagg.keys import Exchange, Identity
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    Envelope,
    KeysRequest,
    SecAggStage,
    SharesRequest,
    Survivors,
    UnmaskRequest,
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


def wiped(site: MaskingParty, error: SecAggError, kind: type[SecAggError]) -> None:
    """The site said no for this reason, and has nothing left to give."""
    assert type(error) is kind, error
    assert site.state is PartyState.IDLE
    assert site._round is None


@pytest.fixture
def five() -> Federation:
    return Federation(5)


def at(federation: Federation, stage: str) -> Any:
    """The honest request with which ``stage`` begins."""
    server = federation.open_server()
    answer = federation.advance(server, "keys", until=stage)
    return server.keys_request() if stage == "keys" else answer


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


@pytest.mark.parametrize(("n", "colluders"), [(5, 2), (6, 3), (10, 3), (150, 15)])
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
