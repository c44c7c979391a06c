"""What a site does in a masked round, and what no coordinator can make it do."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from support.masked_federations import SESSION, STAGES, Consortium, make_job
from support.masked_talk import Talk

from fedgraft.client.participant import Participant
from fedgraft.common.federation.federation_file import Federation, Floor, dump_federation
from fedgraft.common.messages.masked_terms import hash_work
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    MaskedTrain,
    Refusal,
    Request,
    SharesAsk,
    UnmaskAsk,
)
from fedgraft.common.secagg.statements import (
    Confirmation,
    Delivery,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.common.secagg.transcript import context_hash
from fedgraft.simulations.grid.identities import FILE

SECRET = "patient Ada Lovelace"


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(validation=0.25), sites=4)


# Terms


@pytest.mark.parametrize(
    "floor",
    [
        {"colluders": 2},
        {"min_cohort": 5},
        {"min_ring_bits": 32},
        {"max_clip": 0.05},
    ],
    ids=["colluders", "cohort", "ring", "clip"],
)
def test_a_job_below_the_sites_own_floor_is_refused(
    consortium: Consortium, floor: dict[str, Any]
) -> None:
    talk = Talk(consortium)
    own = consortium.known.secure_aggregation.model_dump() | floor
    federation = Federation(secure_aggregation=Floor(**own), sites=consortium.known.sites)
    (consortium.folder / FILE).write_text(dump_federation(federation))
    node, known = talk.nodes["ash"], consortium.known
    context = context_hash(talk.parameters, known.roster, federation.policy)  # as if all agreed
    ask = replace(talk.keys, request=replace(talk.keys.request, context=context))
    assert node.code(ask, "keys") == "terms-refused"
    assert node.memory is None and not (consortium.folder / "ash" / SESSION).exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"cohort": (1, 2, 3)}, "terms-refused"),
        ({"cohort": (0, 1, 2, 4)}, "terms-refused"),
        ({"cohort": (0, 2, 1, 3)}, "terms-refused"),
        ({"cohort": (0, 0, 1, 2)}, "terms-refused"),
        ({"cohort": (0, 1)}, "terms-refused"),
        ({"cohort": ()}, "terms-refused"),
        ({"cohort": tuple(range(9))}, "terms-refused"),
        ({"session": "../../etc"}, "abstained"),
        ({"session": "f" * 32}, "terms-refused"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_keys_are_given_for_nothing_but_the_terms_that_were_agreed(
    consortium: Consortium, changes: dict[str, Any], code: str
) -> None:
    talk = Talk(consortium)
    node, ask = talk.nodes["ash"], replace(talk.keys, **changes)
    assert node.code(ask, "keys") == code
    assert node.memory is None


CLEAR = make_job(masked=False, validation=0.25).for_sites().model_dump_json()
FINER = make_job(validation=0.25, privacy={"clip": 0.05}).for_sites().model_dump_json()


@pytest.mark.parametrize("honest", [True, False], ids=["hashed", "as it was hashed before"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"stage": "predict"}, "terms-refused"),
        ({"stage": "evaluate"}, "terms-refused"),
        ({"names": ("base.other.weight",)}, "abstained"),
        ({"round": 0}, "abstained"),
        ({"job": "{}"}, "abstained"),
        ({"job": CLEAR}, "terms-refused"),
        ({"job": FINER}, "terms-refused"),
    ],
    ids=["stage", "evaluation", "names", "round", "no job", "clear job", "other clip"],
)
def test_keys_are_not_given_for_other_work(
    consortium: Consortium, changes: dict[str, Any], code: str, honest: bool
) -> None:
    # The context is still that of the round that everyone else begins.
    talk = Talk(consortium)
    work = replace(talk.keys.work, **changes)
    model = hash_work(work) if honest else talk.keys.request.model
    ask = replace(talk.keys, work=work, request=replace(talk.keys.request, model=model))
    said = talk.nodes["ash"].code(ask, "keys")
    assert said == code if honest else said in ("terms-refused", "abstained")
    assert talk.nodes["ash"].memory is None


@pytest.mark.parametrize(
    "changes", [{"job": FINER}, {"attempt": 1}, {"round": 2}, {"adapter": bytes(32)}]
)
def test_the_work_that_sets_the_terms_is_the_one_that_is_hashed(
    consortium: Consortium, changes: dict[str, Any]
) -> None:
    # Everyone is told the same hash; it commits to other work than the terms are made of.
    talk = Talk(consortium)
    model = hash_work(replace(talk.keys.work, **changes))
    ask = replace(talk.keys, request=replace(talk.keys.request, model=model))
    assert talk.nodes["ash"].code(ask, "keys") == "terms-refused"


# What is sent must be what was agreed


def forbidden(participant: Participant, request: Any) -> None:
    pytest.fail("it must not come to this")


def nudged(request: Any) -> Any:
    adapter = request.adapter.copy()
    adapter[7] = np.nextafter(adapter[7], np.float32(9))
    return replace(request, adapter=adapter)


BENT: dict[str, Any] = {
    "adapter": nudged,
    "dtype": lambda request: replace(request, adapter=request.adapter.astype(np.float64)),
    "round": lambda request: replace(request, round=request.round + 1),
    "attempt": lambda request: replace(request, attempt=request.attempt + 1),
    "job": lambda request: replace(request, job=request.job + " "),
    "names": lambda request: replace(request, names=request.names[:-1]),
    "order": lambda request: replace(request, names=request.names[::-1]),
    "split": lambda request: replace(request, split="test"),
}


@pytest.mark.parametrize(
    ("work", "change"),
    [("train", change) for change in BENT if change != "split"]
    + [("evaluate", change) for change in BENT if change != "attempt"],
)
def test_a_site_abstains_where_it_is_sent_other_work_than_all_signed_for(
    consortium: Consortium, work: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(consortium, consortium.evaluating() if work == "evaluate" else None)
    ask = talk.until(work)["ash"]
    monkeypatch.setattr(Participant, "train", forbidden)
    monkeypatch.setattr(Participant, "tally", forbidden)
    bent = replace(ask, **{work: BENT[change](talk.request)})
    node = talk.nodes["ash"]
    assert node.code(bent, work) == "abstained"
    assert node.memory is None
    assert node.code(ask, work) == "abstained"  # and there is no second try


# Each stage once, in order


def plausible(talk: Talk, stage: str) -> Request:
    everyone = tuple(range(talk.consortium.sites))
    asks: dict[str, Request] = {
        "shares": SharesAsk(SESSION, SharesRequest(())),
        "train": MaskedTrain(talk.consortium.training(), Delivery(())),
        "confirm": ConfirmAsk(SESSION, Survivors(everyone, everyone, (bytes(64),) * 4)),
        "unmask": UnmaskAsk(SESSION, UnmaskRequest(())),
    }
    return asks[stage]


@pytest.mark.parametrize(
    ("due", "stage"),
    [(due, stage) for due in STAGES for stage in STAGES[1:] if due != stage],
)
def test_a_stage_that_is_not_due_is_not_even_begun(
    consortium: Consortium, due: str, stage: str
) -> None:
    talk = Talk(consortium)
    talk.until(due)
    node, claims = talk.nodes["ash"], consortium.folder / "ash" / SESSION / "claims"
    before = claims.exists() and claims.read_text()
    assert node.code(plausible(talk, stage), stage) == "abstained"
    assert node.memory is None
    assert (claims.exists() and claims.read_text()) == before


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("copied", [False, True], ids=["as it is", "memory from a copy"])
def test_a_request_is_answered_once(consortium: Consortium, stage: str, copied: bool) -> None:
    talk = Talk(consortium)
    ask, node = talk.until(stage)["ash"], talk.nodes["ash"]
    before = node.copy()
    assert not isinstance(node.ask(ask, stage), Refusal)
    node.state = before if copied else node.state
    assert node.code(ask, stage) == "abstained"
    assert node.memory is None


@pytest.mark.parametrize("claims", [True, False], ids=["claims kept", "claims lost"])
def test_a_copy_of_memory_signs_no_second_set_of_survivors(
    consortium: Consortium, claims: bool
) -> None:
    talk = Talk(consortium)
    ask, node = talk.until("confirm")["ash"], talk.nodes["ash"]
    before = node.copy()
    assert isinstance(node.ask(ask, "confirm"), Confirmation)
    node.state = before
    if not claims:
        (consortium.folder / "ash" / SESSION / "claims").unlink()
    signed = ask.survivors.signatures[:3]
    fewer = ConfirmAsk(SESSION, Survivors((0, 1, 2, 3), (0, 1, 2), signed))
    assert node.code(fewer, "confirm") == "abstained"


def test_the_same_work_is_not_summed_over_other_sites_later(consortium: Consortium) -> None:
    first = Talk(consortium)
    first.finish()
    for attempt, code in ((0, "abstained"), (1, "")):
        request = consortium.training(attempt)
        later = Talk(consortium, request, number=2 + attempt, nodes=first.nodes)
        asks = later.until("train")
        del asks["elm"]  # the difference of the two sums would be its update
        ask = later.step("train", asks)["ash"]
        said = first.nodes["ash"].ask(ask, "confirm")
        assert said == Refusal(SESSION, code) if code else isinstance(said, Confirmation)


def test_a_round_does_not_go_on_after_a_day(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(consortium)
    ask = talk.until("shares")["ash"]
    now = time.time()
    monkeypatch.setattr("fedgraft.client.masked_participant.time.time", lambda: now + 86500)
    assert talk.nodes["ash"].code(ask, "shares") == "abstained"
    assert talk.nodes["ash"].memory is None


def test_a_round_that_was_served_is_not_served_again_and_a_later_one_is(
    consortium: Consortium,
) -> None:
    first = Talk(consortium, number=5)
    first.finish()
    for number in (1, 5):
        again = Talk(consortium, number=number, nodes=first.nodes)
        assert first.nodes["ash"].code(again.keys, "keys") == "abstained"
    assert Talk(consortium, number=6, nodes=first.nodes).finish().weight > 4


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_site_that_was_restarted_abstains_until_the_next_round(
    consortium: Consortium, stage: str
) -> None:
    talk = Talk(consortium)
    ask, node = talk.until(stage)["ash"], talk.nodes["ash"]
    node.state = RecordDict()
    assert node.code(ask, stage) == "abstained"
    assert Talk(consortium, number=2, nodes=talk.nodes).finish().weight > 4


@pytest.mark.parametrize("stage", STAGES[1:])
def test_another_session_says_nothing_about_this_one(consortium: Consortium, stage: str) -> None:
    talk = Talk(consortium)
    ask = talk.until(stage)["ash"]
    if stage == "train":
        ask = replace(ask, train=replace(ask.train, session="f" * 32))
    else:
        ask = replace(ask, session="f" * 32)
    assert talk.nodes["ash"].code(ask, stage) == "abstained"
    assert talk.nodes["ash"].memory is None
