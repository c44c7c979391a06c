"""The coordinator's masked round: whoever drops out, it opens the sum of the others or nothing."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.masked_federations import NAMES, STAGES, Consortium, make_job
from support.matrix import thinned

from fedgraft.client.participant import Participant
from fedgraft.common.errors import InputError, RoundAborted, TooFewSites
from fedgraft.common.messages.codec import decode
from fedgraft.common.messages.payloads import EvaluateRequest, KeysAsk, MaskedTrain
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.secagg.statements import Aggregate
from fedgraft.server.protocol.masked import Masking, evaluate_masked, gather_masked
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.protocol.unmasking_server import UnmaskingServer
from fedgraft.server.rounds import run_job, run_round
from fedgraft.server.state import Dropped, RoundRecord, State

PAIRS = list(itertools.combinations_with_replacement(STAGES, 2))
ABSENT = ("keys", "shares", "train")  # who drops there is not in the sum
REASONS = {
    "silent": "app-failed",
    "lost": "app-failed",
    "refuse": "abstained",
    "garbage": "malformed",
    "stranger": "another-sites-id",
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Aggregate]:
    """Every sum that was opened."""
    found: list[Aggregate] = []
    finish = UnmaskingServer.finish

    def spy(server: UnmaskingServer) -> Aggregate:
        found.append(finish(server))
        return found[-1]

    monkeypatch.setattr(UnmaskingServer, "finish", spy)
    return found


def close(found: Any, wanted: Any, record: RoundRecord) -> None:
    """Equal up to the stated bound, and to the rounding of float32."""
    assert record.masked is not None
    assert record.masked["clipped"] == 0
    assert record.masked["error_bound"] < 3e-6
    assert np.abs(found - wanted).max() <= record.masked["error_bound"] + 1e-7
    assert np.abs(wanted).max() > 1e-3


def present(faults: dict[str, str], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if faults.get(name, "").split("=")[0] not in ABSENT]


# Dropouts


@pytest.mark.parametrize(("action", "stage"), thinned(itertools.product(REASONS, STAGES), 7))
def test_a_site_that_drops_out_costs_its_own_part_only(
    tmp_path: Path, stage: str, action: str
) -> None:
    consortium = Consortium(tmp_path, make_job())
    faults = {"cedar": f"{stage}={action}"}
    state, record, _ = consortium.run_round(faults)
    inside = present(faults, consortium.names)
    close(state.adapter, consortium.mean_of(inside), record)
    assert (record.asked, record.sites) == (5, len(inside))
    assert record.examples == sum(consortium.trained(name).examples for name in inside)
    assert record.dropped == (Dropped("cedar", REASONS[action]),)


@pytest.mark.parametrize(("first", "second"), thinned(PAIRS, 4))
def test_two_of_six_may_drop_out_anywhere(tmp_path: Path, first: str, second: str) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=6)
    faults = {"oak": f"{first}=silent", "beech": f"{second}=lost"}
    state, record, grid = consortium.run_round(faults)
    inside = present(faults, consortium.names)
    close(state.adapter, consortium.mean_of(inside), record)
    assert {drop.site for drop in record.dropped} == {"oak", "beech"}
    for name, stage in (("oak", first), ("beech", second)):
        asked = [each for each, site, _ in grid.asked if site == name]
        assert asked == ["plan", *STAGES[: STAGES.index(stage) + 1]]  # once each, and no more


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_nothing_is_opened_and_the_next_attempt_works(
    tmp_path: Path, stage: str, opened: list[Aggregate]
) -> None:
    consortium = Consortium(tmp_path, make_job(count=1), sites=4)
    faults = {"ash": f"{stage}/1=silent", "elm": f"{stage}/1=lost"}
    transport = consortium.transport(consortium.grid(faults))
    with pytest.raises(TooFewSites) as caught:
        run_round(consortium.plan, transport, consortium.start)
    assert opened == []
    assert "ash: app-failed" in str(caught.value) and "elm: app-failed" in str(caught.value)
    assert caught.value.hint and caught.value.exit_code == 4
    state, record = run_round(consortium.plan, transport, consortium.start, 1)
    assert record.sites == 4 and record.dropped == ()
    assert len(opened) == 1
    close(state.adapter, consortium.mean_of(consortium.names, attempt=1), record)


@pytest.mark.parametrize("stage", STAGES[:4])
def test_before_the_threshold_is_reached_no_share_is_asked_for(tmp_path: Path, stage: str) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=3)  # three stand no dropout at all
    grid = consortium.grid({"beech": f"{stage}=refuse"})
    with pytest.raises(TooFewSites):
        run_round(consortium.plan, consortium.transport(grid), consortium.start)
    assert grid.who("unmask") == []
    assert grid.asked[-1][0] == stage


def test_a_run_survives_an_attempt_that_came_to_nothing(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=4)
    grid = consortium.grid({"ash": "shares/1=silent", "elm": "shares/1=silent confirm/2=refuse"})
    warnings: list[tuple[str, Any]] = []
    commits: list[tuple[State, RoundRecord]] = []
    run_job(
        consortium.plan,
        Transport(grid, clock=lambda: 0.0),
        consortium.start,
        commit=lambda *round: commits.append(round),
        warn=lambda what, sites: warnings.append((what, sites)),
    )
    ((what, sites),) = warnings
    assert what.startswith("round 1: ") and sites == ()
    (first, record), (last, _) = commits
    close(first.adapter, consortium.mean_of(consortium.names, attempt=1), record)
    assert (last.round, record.sites) == (2, 4)
    works = [decode(content, KeysAsk).work for stage, _, content in grid.asked if stage == "keys"]
    assert [(work.round, work.attempt) for work in works[::4]] == [(1, 0), (1, 1), (2, 0)]


def test_a_run_that_never_has_enough_sites_gives_up_where_it_was(
    tmp_path: Path, opened: list[Aggregate]
) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=3)
    commits: list[RoundRecord] = []
    grid = consortium.grid({"ash": "confirm=silent"})
    with pytest.raises(TooFewSites):
        run_job(
            consortium.plan,
            Transport(grid, clock=lambda: 0.0),
            consortium.start,
            commit=lambda state, record: commits.append(record),
            warn=lambda what, sites: None,
        )
    assert commits == [] and opened == []
    assert grid.who("train") == 3 * list(consortium.names)


def test_min_sites_holds_before_anything_is_unmasked(
    tmp_path: Path, opened: list[Aggregate]
) -> None:
    consortium = Consortium(tmp_path, make_job(min_sites=5))
    grid = consortium.grid({"fir": "train=silent"})
    with pytest.raises(TooFewSites, match=r"only 4 sites, min_sites is 5 .*fir: app-failed"):
        run_round(consortium.plan, consortium.transport(grid), consortium.start)
    assert opened == []
    assert grid.who("train") and not grid.who("confirm") and not grid.who("unmask")


def test_each_masked_round_has_a_number_of_its_own_also_after_a_failure(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(validation=0.25), sites=4)
    grid = consortium.grid({"ash": "train/1=silent", "elm": "train/1=silent"})
    transport = consortium.transport(grid)
    with pytest.raises(TooFewSites):
        run_round(consortium.plan, transport, consortium.start)
    run_round(consortium.plan, transport, consortium.start, 1)
    asks = [decode(content, KeysAsk) for stage, _, content in grid.asked if stage == "keys"]
    numbers = [(ask.work.stage, ask.request.round) for ask in asks]
    assert numbers == [
        *[("train", 1)] * 4,
        *[("train", 2)] * 4,
        *[("evaluate", 3)] * 4,
    ]


# Sites that lie


def test_a_site_that_seals_garbage_is_named(tmp_path: Path, opened: list[Aggregate]) -> None:
    consortium = Consortium(tmp_path, make_job())
    with pytest.raises(TooFewSites, match="ash: blames fir"):
        consortium.run_round({"fir": "shares=spoil"})
    assert opened == []


@pytest.mark.parametrize(("stage", "inside"), [("keys", 4), ("confirm", 5)])
def test_a_signature_that_is_wrong_counts_as_none(tmp_path: Path, stage: str, inside: int) -> None:
    consortium = Consortium(tmp_path, make_job())
    state, record, _ = consortium.run_round({"fir": f"{stage}=spoil"})
    close(state.adapter, consortium.mean_of(consortium.names[:inside]), record)
    assert record.dropped == (Dropped("fir", f"bad-{stage}"),)


def test_wrong_shares_are_made_up_for_by_the_others(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job())
    state, record, _ = consortium.run_round({"elm": "unmask=spoil"})
    close(state.adapter, consortium.mean_of(consortium.names), record)
    assert record.sites == 5


def test_a_vector_that_breaks_the_sum_aborts_the_round(
    tmp_path: Path, opened: list[Aggregate]
) -> None:
    consortium = Consortium(tmp_path, make_job())
    with pytest.raises(RoundAborted, match="check lanes") as caught:
        consortium.run_round({"elm": "train=spoil"})
    assert not isinstance(caught.value, TooFewSites)
    assert opened == []


def test_shares_that_open_nothing_abort_the_round_and_name_the_site(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=4)
    faults = {"ash": "unmask=spoil", "elm": "unmask=spoil"}
    with pytest.raises(RoundAborted, match=r"\(look at ash\)") as caught:
        consortium.run_round(faults)
    assert not isinstance(caught.value, TooFewSites)


def test_a_mean_that_is_too_large_is_not_applied(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(aggregation={"max_update_norm": 1e-6}))
    with pytest.raises(RoundAborted, match="max_update_norm"):
        consortium.run_round()


# What is asked of whom


def test_nothing_is_asked_in_clear(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(validation=0.25))
    grid = consortium.run_round()[2]
    kinds = [str(content["payload"]["kind"]) for _, _, content in grid.asked]
    wanted = ["PlanRequest"]
    for work in ("MaskedTrain", "MaskedEvaluate"):
        wanted += ["KeysAsk", "SharesAsk", work, "ConfirmAsk", "UnmaskAsk"]
    assert kinds == [kind for kind in wanted for _ in range(5)]


def test_a_site_gets_what_was_sealed_for_it_and_nothing_else(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job())
    grid = consortium.run_round({"beech": "shares=silent"})[2]
    tasks = {
        site: decode(content, MaskedTrain)
        for stage, site, content in grid.asked
        if stage == "train"
    }
    assert sorted(tasks) == ["ash", "cedar", "elm", "fir"]
    for site, task in tasks.items():
        own = consortium.known.ids[site]
        assert {envelope.recipient for envelope in task.delivery.envelopes} == {own}
        senders = [envelope.sender for envelope in task.delivery.envelopes]
        assert senders == sorted({0, 2, 3, 4} - {own})


def test_a_site_that_is_not_in_the_roster_takes_no_part(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(count=1), sites=3)
    grid = consortium.grid({"mallory": "plan=agree"})
    warnings: list[tuple[str, Any]] = []
    state = run_job(
        consortium.plan,
        Transport(grid, clock=lambda: 0.0),
        consortium.start,
        commit=lambda state, record: None,
        warn=lambda what, sites: warnings.append((what, sites)),
    )
    assert state.round == 1
    assert warnings == [("refused to take part", [Dropped("mallory", "not-in-roster")])]
    assert [stage for stage, site, _ in grid.asked if site == "mallory"] == ["plan"]


def test_a_masked_job_without_the_sites_keys_does_not_start(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=3)
    grid = consortium.grid()
    plan = replace(consortium.plan, masking=None)
    with pytest.raises(InputError, match="public keys"):
        run_job(
            plan,
            Transport(grid, clock=lambda: 0.0),
            consortium.start,
            commit=lambda state, record: None,
            warn=lambda what, sites: None,
        )
    assert grid.asked == []


def test_a_cohort_below_the_floor_is_asked_nothing(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, make_job(), sites=4)
    floor = consortium.known.secure_aggregation.model_copy(update={"min_cohort": 5})
    federation = consortium.known.model_copy(update={"secure_aggregation": floor})
    grid = consortium.grid()
    transport = consortium.transport(grid)
    masking = Masking(federation, itertools.count(1).__next__)
    with pytest.raises(RoundAborted, match="smaller than the policy allows"):
        gather_masked(
            masking,
            consortium.job,
            transport,
            NAMES[:4],
            consortium.training(),
            consortium.plan.exchanged,
        )
    assert {stage for stage, _, _ in grid.asked} == {"plan"}


# Validation


def validated(consortium: Consortium, faults: dict[str, str]) -> tuple[State, RoundRecord]:
    state, record, _ = consortium.run_round(faults)
    assert state.round == 1
    close(state.adapter, consortium.mean_of(consortium.names), record)
    return state, record


@pytest.mark.parametrize(
    "stage", ["keys/2", "shares/2", "evaluate", "confirm/2", "unmask/2"], ids=lambda at: at[:4]
)
def test_validation_that_cannot_be_opened_costs_the_round_nothing_else(
    tmp_path: Path, stage: str
) -> None:
    consortium = Consortium(tmp_path, make_job(validation=0.25), sites=4)
    faults = {"ash": f"{stage}=silent", "elm": f"{stage}=refuse"}
    _, record = validated(consortium, faults)
    assert record.validation is None
    assert {(drop.site, drop.reason) for drop in record.dropped[:-1]} == {
        ("ash", "app-failed"),
        ("elm", "abstained"),
    }
    last = record.dropped[-1]
    assert last.site == "all sites" and last.reason.startswith("evaluation: round 1: ")


def test_counts_below_zero_are_no_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(participant: Participant, request: EvaluateRequest) -> Tally:
        return Tally(1.0, np.full((10, 10), -3, np.int64))

    monkeypatch.setattr(Participant, "tally", lie)
    consortium = Consortium(tmp_path, make_job(validation=0.25), sites=4)
    _, record = validated(consortium, {})
    assert record.validation is None
    assert record.dropped == (Dropped("all sites", "evaluation: negative counts"),)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_validation_among_too_few_sites_is_none(tmp_path: Path, count: int) -> None:
    consortium = Consortium(tmp_path, make_job(validation=0.25), sites=4)
    grid = consortium.grid()
    transport = consortium.transport(grid)
    assert consortium.plan.masking is not None
    request = consortium.evaluating()
    checked = evaluate_masked(
        consortium.plan.masking, consortium.job, transport, NAMES[:count], request
    )
    assert checked.tally.examples == 0 and grid.who("keys") == []
    assert [drop.site for drop in checked.traffic.dropped] == ["all sites"]
