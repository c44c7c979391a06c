"""The whole protocol in memory: exact sums, every dropout, the fixed transcript."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg.federation import (
    MODEL,
    STAGES,
    Federation,
    coding_for,
    parameters_for,
    refused,
    stream,
)
from secagg.replay import SURVIVORS, replay
from support.matrix import slow_unless, tries

from fedgraft.client.secagg.round_secrets import PartyState
from fedgraft.common.secagg.errors import ParameterError, StageError, TooFewParties
from fedgraft.common.secagg.graph import plan_graph
from fedgraft.common.secagg.quantize import mean
from fedgraft.common.secagg.statements import SecAggStage

CASE = json.loads(
    (Path(__file__).parents[1] / "vectors/secagg/transcript_n4.json").read_text(encoding="utf-8")
)


def test_the_fixed_transcript_byte_for_byte() -> None:
    federation = Federation(4, length=CASE["length"], fixed=True)
    messages = CASE["messages"]
    server = federation.open_server()
    assert server.keys_request().context.hex() == messages["context"]
    boxes_in = federation.do_keys(server)
    for found, wanted in zip(boxes_in.advertisements, messages["advertisements"], strict=True):
        assert found.signature.hex() == wanted["signature"]
        assert found.mask_key.hex() in wanted["body"]
    sealed = [federation.sites[site].share(boxes_in) for site in range(4)]
    for reply, wanted in zip(sealed, messages["envelopes"], strict=True):
        assert [envelope.ciphertext.hex() for envelope in reply.envelopes] == wanted
        server.add_shares(reply)
    boxes = server.close_shares()
    for site, wanted, signature in zip(
        SURVIVORS, messages["masked"], messages["masked_signatures"], strict=True
    ):
        federation.sites[site].accept(boxes[site], MODEL)
        masked = federation.contribute(site)
        assert masked.packed.tobytes().hex() == wanted
        assert masked.signature.hex() == signature
        server.add_masked(masked)
    survivors = server.close_training()
    for site, wanted in zip(SURVIVORS, messages["confirmations"], strict=True):
        confirmation = federation.sites[site].confirm(survivors)
        assert confirmation.signature.hex() == wanted
        server.add_confirmation(confirmation)
    request = server.close_confirm()
    for site, wanted in zip(SURVIVORS, messages["openings"], strict=True):
        opening = federation.sites[site].unmask(request)
        assert [share.share.hex() for share in opening.shares] == wanted
        server.add_opening(opening)
    assert server.finish().sums.tolist() == messages["sums"]


def test_the_slow_reference_says_the_same() -> None:
    assert replay(CASE) == CASE["messages"]


def test_the_case_is_the_one_the_federation_runs() -> None:
    federation = Federation(4, length=CASE["length"], fixed=True)
    assert [key.private_bytes().hex() for key in federation.identities] == CASE["identities"]
    for site in range(4):
        entropy = stream(f"site {site}")
        drawn = b"".join(entropy(size) for size in (32, 32, 32, 128))
        assert drawn.hex() == CASE["secrets"][site]
        assert federation.updates[site].tolist() == CASE["updates"][site]


@pytest.mark.parametrize(("ring", "bits"), [(16, 8), (24, 17), (32, 20)])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 101])
def test_sums_are_exact_in_every_ring(ring: int, bits: int, length: int) -> None:
    coding = coding_for(5, ring_bits=ring, value_bits=bits)
    federation = Federation(
        5, length=length, parameters=parameters_for(5, length, coding=coding, dropouts=1)
    )
    result = federation.run({"train": [3]})
    assert result.survivors == (0, 1, 2, 4)
    federation.check(result)
    assert result.sums.dtype == np.int32


@settings(max_examples=tries(25), deadline=None)
@given(data=st.data())
def test_the_sum_is_exact_whoever_drops(data: st.DataObject) -> None:
    n = data.draw(st.integers(3, 9))
    length = data.draw(st.integers(0, 40))
    federation = Federation(n, length=length, threads=data.draw(st.integers(1, 3)))
    for site in federation.sites:
        federation.weights[site] = data.draw(st.integers(1, 1000))
    plan = plan_graph(n, 1, 0)
    gone = data.draw(st.sets(st.integers(0, n - 1), max_size=n - plan.fewest_survivors))
    drops: dict[str, list[int]] = {}
    for site in sorted(gone):
        drops.setdefault(data.draw(st.sampled_from(STAGES)), []).append(site)
    federation.check(federation.run(drops))


@pytest.mark.parametrize("n", slow_unless([3, 4, 5, 7], (3, 5).__contains__))
@pytest.mark.parametrize("stage", STAGES)
def test_any_site_may_drop_at_any_stage(n: int, stage: str) -> None:
    plan = plan_graph(n, 1, 0)
    federation = Federation(n)
    number = 0
    pairs = itertools.combinations(range(n), 2)
    for gone in [*((site,) for site in range(n)), *pairs]:
        number += 1
        left = n - len(gone)
        enough = left >= (plan.share_threshold if stage == "unmask" else plan.fewest_survivors)
        if enough:
            result = federation.run({stage: gone}, number)
            signed = range(n) if stage in ("confirm", "unmask") else set(range(n)) - set(gone)
            assert result.survivors == tuple(signed)
            federation.check(result)
        else:
            error = refused(federation.run, {stage: gone}, number)
            assert isinstance(error, TooFewParties)
    number += 1
    for site in federation.sites.values():
        site.abort()
    federation.check(federation.run(number=number))  # the next round works


def test_drops_at_several_stages_of_one_round() -> None:
    federation = Federation(12)
    result = federation.run(
        {"keys": [0], "shares": [3], "train": [4], "confirm": [6], "unmask": [1]}
    )
    assert result.survivors == (1, 2, 5, 6, 7, 8, 9, 10, 11)
    federation.check(result)


@pytest.mark.parametrize("seed", range(3))
def test_random_drops_among_32(seed: int) -> None:
    federation = Federation(32, length=300)
    generator = np.random.default_rng(seed)
    gone = generator.permutation(32)[:12].tolist()
    drops: dict[str, list[int]] = {}
    for site in gone:
        drops.setdefault(STAGES[int(generator.integers(5))], []).append(site)
    federation.check(federation.run(drops))


@pytest.mark.slow
def test_a_sparse_graph_of_200_with_a_fifth_dropping_anywhere() -> None:
    coding = coding_for(200, ring_bits=32, value_bits=20)
    parameters = parameters_for(200, 20, colluders=20, dropouts=40, coding=coding)
    assert (parameters.plan.degree, parameters.plan.share_threshold) == (42, 20)
    federation = Federation(200, length=20, parameters=parameters)
    generator = np.random.default_rng(5)
    drops: dict[str, list[int]] = {}
    for site in generator.permutation(200)[:40].tolist():
        drops.setdefault(STAGES[int(generator.integers(5))], []).append(site)
    federation.check(federation.run(drops))


def test_a_cohort_that_is_part_of_the_roster() -> None:
    parameters = parameters_for(4, 5, cohort=(1, 3, 4, 8))
    federation = Federation(9, parameters=parameters)
    result = federation.run({"train": [3]})
    assert result.survivors == (1, 4, 8)
    federation.check(result)


def test_the_mean_is_plain_weighted_averaging() -> None:
    federation = Federation(6, length=1000)
    result = federation.run()
    coding = federation.settings.coding
    found = mean(result.sums, result.weight, coding)
    clipped = np.array([np.clip(federation.updates[i].astype(float), -0.5, 0.5) for i in range(6)])
    wanted = np.average(clipped, axis=0, weights=list(federation.weights.values()))
    bound = 6 * 0.5 * coding.max_weight / (coding.levels * result.weight)
    assert np.abs(found - wanted).max() < bound


def test_arrival_order_changes_nothing() -> None:
    results = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        federation = Federation(5)
        federation.sites = {site: federation.sites[site] for site in order}
        results.append(federation.run())
    np.testing.assert_array_equal(results[0].sums, results[1].sums)


def test_states_and_stages_go_in_order() -> None:
    federation = Federation(3)
    site, server = federation.sites[0], federation.open_server()
    assert site.state is PartyState.IDLE
    answer: Any = None
    states = [
        PartyState.ADVERTISED,
        PartyState.SHARED,
        PartyState.MASKED,
        PartyState.CONFIRMED,
        PartyState.IDLE,
    ]
    opened = [
        SecAggStage.SHARES,
        SecAggStage.TRAIN,
        SecAggStage.CONFIRM,
        SecAggStage.UNMASK,
        SecAggStage.OVER,
    ]
    for stage, state, after in zip(STAGES, states, opened, strict=True):
        answer = getattr(federation, f"do_{stage}")(server, answer)
        assert site.state is state
        assert server.stage is after
    assert isinstance(refused(server.finish), StageError)
    assert isinstance(refused(server.keys_request), StageError)


@pytest.mark.parametrize("n", [4, 5])
def test_a_site_goes_on_from_its_memory_at_every_stage(n: int) -> None:
    """As where each message is answered by another process."""
    federation = Federation(n)
    server = federation.open_server()
    answer: Any = None
    for stage in STAGES:
        answer = getattr(federation, f"do_{stage}")(server, answer, [1] if stage == "train" else ())
        for site, party in federation.sites.items():
            memory = party.remember()
            assert (memory is None) == (stage == "unmask" and site not in federation.gone)
            federation.sites[site] = federation.open_site(site, memory=memory)
            assert federation.sites[site].remember() == memory
    federation.check(answer)


def test_too_many_parties_for_the_coding_are_refused_when_the_job_is_loaded() -> None:
    with pytest.raises(ParameterError):
        parameters_for(4, 5, coding=coding_for(3))
