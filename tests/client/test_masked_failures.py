"""A site that cannot do its part in a masked round abstains, and nobody learns why."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.masked_federations import SESSION, Consortium, make_job, saying
from support.masked_talk import Talk

from fedgraft.client.participant import Participant
from fedgraft.client.training import trainer as training
from fedgraft.common.errors import SiteFailure
from fedgraft.common.messages.payloads import Refusal, TrainRequest
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.secagg.statements import MaskedInput

SECRET = "patient Ada Lovelace"


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logger = logging.getLogger("fedgraft")
    before = logger.propagate
    logger.propagate = True
    caplog.set_level(logging.DEBUG)
    yield
    logger.propagate = before


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(validation=0.25), sites=4)


def test_whoever_sealed_garbage_is_blamed(consortium: Consortium) -> None:
    talk = Talk(consortium)
    ask = talk.until("train")["ash"]
    first, *others = ask.delivery.envelopes
    bent = (replace(first, ciphertext=bytes(80)), *others)
    spoilt = replace(ask, delivery=replace(ask.delivery, envelopes=bent))
    assert talk.nodes["ash"].code(spoilt, "train") == f"blames-{first.sender}"
    assert talk.nodes["ash"].memory is None


def test_what_can_be_masked_is_sent(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Participant, "train", saying(consortium.trained("ash")))
    talk = Talk(consortium)
    ask = talk.until("train")["ash"]
    assert isinstance(talk.nodes["ash"].ask(ask, "train"), MaskedInput)


@pytest.mark.parametrize(
    "reply",
    [
        {"loss": float("nan")},
        {"loss": 1000.0},
        {"examples": 65},
        {"examples": 0},
        {"update": np.full(1546, np.nan, np.float32)},
        {"update": np.zeros(3, np.float32)},
    ],
    ids=["nan", "loss", "weight", "none", "update", "length"],
)
def test_what_cannot_be_masked_is_not_sent_and_nobody_learns_why(
    consortium: Consortium, reply: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = consortium.trained("ash")
    assert honest.update.shape == (1546,)
    monkeypatch.setattr(Participant, "train", saying(replace(honest, **reply)))
    talk = Talk(consortium)
    ask = talk.until("train")["ash"]
    assert talk.nodes["ash"].ask(ask, "train") == Refusal(SESSION, "abstained")
    assert talk.nodes["ash"].memory is None


@pytest.mark.parametrize(
    "tally",
    [
        Tally(float("nan"), np.ones((10, 10), np.int64)),
        Tally(131073.0, np.ones((10, 10), np.int64)),
        Tally(1.0, np.full((10, 10), 1 << 28, np.int64)),
    ],
    ids=["nan", "loss", "counts"],
)
def test_a_tally_that_cannot_be_masked_is_not_sent_either(
    consortium: Consortium, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Participant, "tally", lambda at, request: tally)
    talk = Talk(consortium, consortium.evaluating())
    ask = talk.until("evaluate")["ash"]
    assert talk.nodes["ash"].ask(ask, "evaluate") == Refusal(SESSION, "abstained")
    assert talk.nodes["ash"].memory is None


@pytest.mark.parametrize(("max_sites", "count"), [(65535, 48_000), (2048, 2**20), (128, 2**24)])
def test_the_sites_own_log_says_that_a_count_had_no_room(
    tmp_path: Path,
    max_sites: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wide = Consortium(
        tmp_path, make_job(validation=0.25, privacy={"max_sites": max_sites}), sites=4
    )
    confusion = np.zeros((10, 10), np.int64)
    confusion[3, 3] = count
    monkeypatch.setattr(Participant, "tally", lambda at, request: Tally(1.0, confusion))
    talk = Talk(wide, wide.evaluating())
    ask = talk.until("evaluate")["ash"]
    assert talk.nodes["ash"].ask(ask, "evaluate") == Refusal(SESSION, "abstained")
    assert "lower privacy.secure_aggregation.max_sites" in caplog.text
    assert f"{count:,}" not in caplog.text


@pytest.mark.parametrize(
    "error",
    [ValueError(SECRET), MemoryError(SECRET), SiteFailure("no-examples", SECRET[:0])],
    ids=["value", "memory", "site"],
)
def test_the_text_and_the_code_of_a_failure_stay_at_the_site(
    consortium: Consortium,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(participant: Participant, request: TrainRequest) -> None:
        raise error

    talk = Talk(consortium)
    ask = talk.until("train")["ash"]
    monkeypatch.setattr(Participant, "train", fail)
    assert talk.nodes["ash"].ask(ask, "train") == Refusal(SESSION, "abstained")
    assert talk.nodes["ash"].memory is None
    assert f"abstained from a masked round: {type(error).__name__}" in caplog.text
    assert SECRET not in caplog.text
    assert all(SECRET not in repr(entry.__dict__) for entry in caplog.records)


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_the_text_of_a_failure_in_the_pass_stays_at_the_site(
    consortium: Consortium,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training is done for several sites at once, outside of any site's own steps."""

    def fail(*args: object, **options: object) -> None:
        raise error(SECRET)

    talk = Talk(consortium)
    ask = talk.until("train")["ash"]
    monkeypatch.setattr(training, "train", fail)
    assert talk.nodes["ash"].ask(ask, "train") == Refusal(SESSION, "abstained")
    assert talk.nodes["ash"].memory is None
    assert SECRET not in caplog.text
    assert all(SECRET not in repr(entry.__dict__) for entry in caplog.records)


def test_a_site_whose_training_fails_abstains_and_forgets(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> list[SiteFailure]:
        return [SiteFailure("loss-not-finite")]

    talk = Talk(consortium)
    ask = talk.until("train")["ash"]
    monkeypatch.setattr(training, "train", fail)
    assert talk.nodes["ash"].ask(ask, "train") == Refusal(SESSION, "abstained")
    assert talk.nodes["ash"].memory is None
    assert "abstained from a masked round: SiteFailure: loss-not-finite" in caplog.text
