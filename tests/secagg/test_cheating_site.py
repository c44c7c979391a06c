"""Sites that cheat with keys, inputs and ids: named where they can be, and never a wrong sum."""

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
from fedgraft.common.secagg.quantize import LANES, add_packed, pack
from fedgraft.common.secagg.statements import Advertisement, Delivery, SecAggStage
from fedgraft.common.secagg.transcript import Frame, Policy, advertisement_body, sign


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
