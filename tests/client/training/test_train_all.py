"""Several sites of one process are asked to train at once, and each answers as it would alone."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from support.masked_federations import Consortium, make_job
from support.masked_talk import Node as Seat
from support.masked_talk import Talk

from fedgraft.client.app import app, train_all
from fedgraft.client.training import trainer as training
from fedgraft.common.messages.codec import Stage, decode, encode
from fedgraft.common.messages.payloads import EvaluateRequest, Refusal, TrainReply, TrainRequest
from fedgraft.common.secagg.statements import MaskedInput
from fedgraft.simulations.grid.workers import Workers

SECRET = "patient Ada Lovelace"
SIZES = (40, 9, 1, 17, 25, 8)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logger = logging.getLogger("fedgraft")
    before = logger.propagate
    logger.propagate = True
    caplog.set_level(logging.DEBUG)
    yield
    logger.propagate = before


@pytest.fixture
def clear(tmp_path: Path) -> Consortium:
    job = make_job(masked=False, validation=0.2, method={"dropout": 0.2, "head": "local"})
    return Consortium(tmp_path / "clear", job, sites=6, sizes=SIZES)


Asked = tuple[Message, Context]


def asked(
    config: dict[str, str],
    request: Any,
    state: RecordDict | None = None,
    stage: Stage = Stage.TRAIN,
) -> Asked:
    """A message as Flower hands it to a node of this configuration."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = request if isinstance(request, RecordDict) else encode(request)
    message = Message(content, dst_node_id=7, message_type=stage.value)
    state = RecordDict() if state is None else state
    return message, Context(
        run_id=1, node_id=7, node_config=dict(config), state=state, run_config={}
    )


def said(reply: Message) -> Any:
    assert not reply.has_error()
    return decode(reply.content, TrainReply, MaskedInput, Refusal)


def aside(consortium: Consortium, name: str, folder: str) -> dict[str, str]:
    """The node of a site with another folder for what it keeps."""
    return {**consortium.node(name), "state": str(consortium.folder / folder / name)}


def same(one: Any, other: Any) -> None:
    """Compare two replies up to the last bits of a sum."""
    assert type(one) is type(other)
    if not isinstance(one, TrainReply):
        assert one == other
        return
    assert np.abs(one.update).max() > 1e-4
    np.testing.assert_allclose(one.update, other.update, rtol=0, atol=1e-5)
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    facts = [(r.session, r.round, r.layout, r.examples, r.update.dtype) for r in (one, other)]
    assert facts[0] == facts[1]


def both_ways(
    consortium: Consortium, wanted: Callable[[str, str], Sequence[Asked]]
) -> tuple[list[Any], list[Any]]:
    """What is replied to what ``wanted`` gives for a folder: all at once, and one by one."""
    names = consortium.names
    together = [said(r) for r in train_all([a for n in names for a in wanted(n, "together")])]
    alone = [said(app(*a)) for n in names for a in wanted(n, "alone")]
    return together, alone


def test_sites_answer_together_as_they_would_alone(clear: Consortium) -> None:
    for number in (1, 2):  # in the second from heads of their own
        request = replace(clear.training(), round=number)

        def wanted(name: str, where: str, request: TrainRequest = request) -> list[Asked]:
            return [asked(aside(clear, name, where), request)]

        together, alone = both_ways(clear, wanted)
        for one, other in zip(together, alone, strict=True):
            same(one, other)
        assert [one.examples for one in together] == [34, 8, 1, 10, 23, 6]
        assert len({one.update.tobytes() for one in together}) == 6
    for name in clear.names:  # and each keeps its own head, of both rounds
        kept = [
            sorted((clear.folder / where / name).rglob("*.safetensors"))
            for where in ("together", "alone")
        ]
        assert [path.name for path in kept[0]] == [path.name for path in kept[1]]
        assert len(kept[0]) == 2


def bad_session(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked(config, replace(request, session="../etc"))


def bad_round(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked(config, replace(request, round=0))


def no_message(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked(config, RecordDict())


def other_kind(config: dict[str, str], request: TrainRequest) -> Asked:
    ask = EvaluateRequest(
        request.session, 1, request.job, request.names, "validation", request.adapter
    )
    return asked(config, ask)


def not_finite(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked(config, replace(request, adapter=np.full_like(request.adapter, np.nan)))


def too_short(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked(config, replace(request, adapter=request.adapter[1:]))


def no_site(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked({}, request)


def in_a_federation(config: dict[str, str], request: TrainRequest) -> Asked:
    return asked({**config, "federation": "/nowhere"}, request)


BAD = {
    bad_session: "bad-session",
    bad_round: "bad-round",
    no_message: "MessageError",
    other_kind: "MessageError",
    not_finite: "loss-not-finite",
    too_short: "AdapterError",
    no_site: "KeyError",
    in_a_federation: "secure-aggregation-required",
}


def test_refusals_in_the_midst_are_the_business_of_one_site(clear: Consortium) -> None:
    request = clear.training()
    kinds = [*BAD][: len(clear.names)], [*BAD][len(clear.names) :]

    def wanted(name: str, where: str) -> list[Asked]:
        place, config = clear.names.index(name), aside(clear, name, where)
        bad = [kind(config, request) for group in kinds for kind in group[place : place + 1]]
        return [bad[0], asked(config, request), *bad[1:]]

    together, alone = both_ways(clear, wanted)
    for one, other in zip(together, alone, strict=True):
        same(one, other)
    assert [type(one) for one in together].count(TrainReply) == 6
    codes = {one.code for one in together if isinstance(one, Refusal)}
    assert codes == set(BAD.values())


def test_each_reply_is_to_its_own_message(clear: Consortium) -> None:
    pairs = [asked(clear.node(name), clear.training()) for name in clear.names]
    for number, (message, _) in enumerate(pairs):
        message.metadata.__dict__["_message_id"] = f"m{number}"
    replies = train_all(pairs)
    assert [r.metadata.reply_to_message_id for r in replies] == [f"m{n}" for n in range(6)]


def test_nobody_asked_is_nobody_answered() -> None:
    assert train_all([]) == []


def test_sites_that_want_other_things_are_in_other_passes(
    clear: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(masked=False, validation=0.2, method={"rank": 2})
    other = Consortium(tmp_path / "other", job, sites=6, sizes=SIZES)
    passes: list[int] = []
    train = training.train

    def counted(stack: Any, trained: Any, tasks: Any, **options: Any) -> Any:
        passes.append(len(tasks))
        return train(stack, trained, tasks, **options)

    def wanted(name: str, where: str) -> list[Asked]:
        place = clear.names.index(name)
        request = clear.training() if place % 2 else other.training()
        request = replace(request, round=2) if place == 5 else request
        if place == 3:  # another rule: some tensors stay as they are
            exchanged = clear.plan.exchanged
            some = exchanged.only(exchanged.names[1:])
            adapter = exchanged.part(request.adapter, some)
            request = replace(request, names=some.names, adapter=adapter)
        return [asked(aside(clear, name, where), request)]

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", counted)
        together, alone = both_ways(clear, wanted)
    assert sorted(passes[:-6]) == [1, 1, 1, 3] and passes[-6:] == [1] * 6
    for one, two in zip(together, alone, strict=True):
        same(one, two)


# Masked


def test_masked_and_clear_messages_may_be_answered_at_once(
    clear: Consortium, tmp_path: Path
) -> None:
    masked = Consortium(tmp_path / "masked", make_job(validation=0.2), sites=4)
    talk = Talk(masked)
    asks = talk.until("train")
    spoilt = replace(asks["elm"], train=replace(asks["elm"].train, round=2))
    pairs = [
        asked(talk.nodes["ash"].config, asks["ash"], talk.nodes["ash"].state),
        asked(clear.node("ash"), clear.training()),
        asked(talk.nodes["elm"].config, spoilt, talk.nodes["elm"].state),
        asked(talk.nodes["beech"].config, masked.training(), talk.nodes["beech"].state),
        asked(talk.nodes["cedar"].config, asks["cedar"], talk.nodes["cedar"].state),
    ]
    replies = [said(reply) for reply in train_all(pairs)]
    kinds = [type(reply) for reply in replies]
    assert kinds == [MaskedInput, TrainReply, Refusal, Refusal, MaskedInput]
    assert [reply.code for reply in replies[2:4]] == ["abstained", "secure-aggregation-required"]
    same(replies[1], clear.trained("ash"))
    # What each keeps of its round is its own: those that failed keep nothing.
    seats = {name: talk.nodes[name] for name in ("ash", "elm", "cedar", "beech")}
    kept = {name: seat.memory is not None for name, seat in seats.items()}
    assert kept == {"ash": True, "elm": False, "cedar": True, "beech": True}
    again = Seat(talk.nodes["ash"].config)
    again.state = talk.nodes["ash"].state
    assert again.code(asks["ash"], "train") == "abstained"  # its stage is over


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("together", [2, 5])
def test_a_masked_round_of_sites_in_one_pass_is_the_clear_one(
    tmp_path: Path, together: int, count: int
) -> None:
    masked = Consortium(tmp_path / "masked", make_job())
    with Workers(count, device="cpu") as workers:
        state, record, _ = masked.run_round(workers=workers, together=together)
    assert record.masked is not None and record.dropped == ()
    bound = record.masked["error_bound"]
    assert np.abs(state.adapter - masked.start.adapter).max() > 1e-4
    assert np.abs(state.adapter - masked.mean_of(masked.names)).max() <= bound + 1e-6


# Silence


@pytest.mark.parametrize("error", [ValueError, MemoryError, RuntimeError])
def test_the_text_of_an_exception_in_the_pass_stays_unsaid(
    clear: Consortium,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is nobody's own: all in the pass refuse, and the coordinator learns its name at most."""

    def fail(*args: object, **options: object) -> None:
        raise error(SECRET)

    monkeypatch.setattr(training, "train", fail)
    pairs = [asked(clear.node(name), clear.training()) for name in clear.names[:2]]
    pairs.append(bad_session(clear.node("cedar"), clear.training()))
    replies = train_all(pairs)
    session = clear.training().session
    wanted = [Refusal(session, error.__name__)] * 2 + [Refusal("../etc", "bad-session")]
    assert [said(reply) for reply in replies] == wanted
    assert SECRET not in caplog.text
    assert all(SECRET not in repr(entry.__dict__) for entry in caplog.records)
    assert error.__name__ in caplog.text
