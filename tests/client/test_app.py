"""What a site answers through Flower: payloads, reason codes, and never a word of its data."""

import logging
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from support.masked_federations import Consortium, make_job
from support.masked_talk import Node as Seat
from support.masked_talk import Talk

from fedgraft.client.app import app
from fedgraft.client.membership.identity import make_identity
from fedgraft.client.membership.state_files import IDENTITY
from fedgraft.client.participant import Participant
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.federation.federation_file import Federation, dump_federation
from fedgraft.common.messages.codec import Stage, decode, encode
from fedgraft.common.messages.payloads import (
    EvaluateReply,
    EvaluateRequest,
    Payload,
    PlanReply,
    Refusal,
    TrainReply,
    TrainRequest,
)
from fedgraft.server.plan import Plan, make_plan
from fedgraft.simulations.demo import digits
from fedgraft.simulations.grid.identities import FILE

SESSION = "0123456789abcdef" * 2
SECRET = "patient Ada Lovelace"


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logger = logging.getLogger("fedgraft")
    before = logger.propagate
    logger.propagate = True
    caplog.set_level(logging.DEBUG)
    yield
    logger.propagate = before


class Node:
    """A node as Flower sees it; it answers messages."""

    def __init__(self, folder: Path, train: str | None = None) -> None:
        if train is None:
            rows, _ = digits.load()
            rows.select(range(60)).to_parquet(folder / "train.parquet")
            train = str(folder / "train.parquet")
        site = f'name = "st-mary"\ndevice = "cpu"\n[data]\ntrain = "{train}"\n'
        (folder / "site.toml").write_text(site)
        self.config = {"site": str(folder / "site.toml"), "state": str(folder / "state")}

    def send(self, content: RecordDict, stage: Stage) -> RecordDict:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        message = Message(content, dst_node_id=7, message_type=stage.value)
        context = Context(
            run_id=1, node_id=7, node_config=self.config, state=RecordDict(), run_config={}
        )
        reply = app(message, context)
        assert not reply.has_error()
        return reply.content

    def ask(self, request: Payload, stage: Stage) -> RecordDict:
        return self.send(encode(request), stage)

    def refusal(self, request: Payload, stage: Stage) -> Refusal:
        return decode(self.ask(request, stage), Refusal)


def make_plan_of(task: str = "image", **method: Any) -> Plan:
    raw = {
        "job": {
            "name": "t",
            "task": f"{task}-classification",
            "labels": list(digits.NAMES),
        },
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "head": "shared", **method},
        "data": {"validation": 0.2, "normalize": "per-image"},
    }
    job = parse_job(raw, where="test")
    return make_plan(job, open_workbench(job), SESSION)


def training(plan: Plan, **changes: Any) -> TrainRequest:
    adapter = open_workbench(plan.job).initial_of(plan.exchanged)
    request = TrainRequest(SESSION, 1, 0, plan.request.job, plan.exchanged.names, adapter)
    return replace(request, **changes)


def evaluating(plan: Plan, **changes: Any) -> EvaluateRequest:
    adapter = open_workbench(plan.job).initial_of(plan.exchanged)
    names = plan.exchanged.names
    request = EvaluateRequest(SESSION, 1, plan.request.job, names, "validation", adapter)
    return replace(request, **changes)


def content_bytes(record: RecordDict) -> bytes:
    """All that would travel."""
    return b"".join(name.encode() + part.deflate() for name, part in sorted(record.items())) + (
        b"".join(a.data for part in record.array_records.values() for a in part.values())
    )


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_each_stage_gets_its_answer(node: Node) -> None:
    plan = make_plan_of()
    agreed = decode(node.ask(plan.request, Stage.PLAN), PlanReply)
    assert (agreed.session, agreed.site) == (SESSION, "st-mary")
    update = decode(node.ask(training(plan), Stage.TRAIN), TrainReply)
    assert update.update.shape == (plan.exchanged.size,) and np.abs(update.update).max() > 0
    tally = decode(node.ask(evaluating(plan), Stage.EVALUATE), EvaluateReply)
    assert tally.tally[1:].sum() == 7  # of 60, at a share of 0.2


@pytest.mark.parametrize("head", ["shared", "local"])
def test_the_same_request_gets_the_same_bytes(node: Node, head: str) -> None:
    plan = make_plan_of(head=head, dropout=0.2)
    requests: list[tuple[Payload, Stage]] = [
        (plan.request, Stage.PLAN),
        (training(plan), Stage.TRAIN),
        (evaluating(plan), Stage.EVALUATE),
    ]
    for request, stage in requests:
        first, again = (content_bytes(node.ask(request, stage)) for _ in range(2))
        assert first == again


# Refusals


def test_a_refusal_carries_the_reason_code_and_the_session(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    request = replace(make_plan_of().request, backbone="f" * 64)
    assert node.refusal(request, Stage.PLAN) == Refusal(SESSION, "backbone-differs")
    assert "query.plan refused: backbone-differs" in caplog.text


def test_a_session_that_names_another_folder_is_refused(node: Node, tmp_path: Path) -> None:
    plan = make_plan_of(head="local")
    before = sorted(path.name for path in tmp_path.iterdir())
    for session in ("../../../tmp/x", "..", "/etc"):
        said = node.refusal(training(plan, session=session), Stage.TRAIN)
        assert said.code == "bad-session"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_loss_that_is_not_finite_is_refused_by_its_code(node: Node) -> None:
    plan = make_plan_of()
    adapter = np.full(plan.exchanged.size, np.nan, np.float32)
    said = node.refusal(training(plan, adapter=adapter), Stage.TRAIN)
    assert said == Refusal(SESSION, "loss-not-finite")
    # And the site is well again afterwards.
    decode(node.ask(training(plan), Stage.TRAIN), TrainReply)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"payload": ConfigRecord({"kind": "TrainRequest", "format": 1})}),
        RecordDict({"payload": ConfigRecord({"kind": "Exec", "format": 1, "session": SESSION})}),
        encode(Refusal(SESSION, "hm")),
    ],
    ids=["empty", "fields", "kind", "reply"],
)
@pytest.mark.parametrize("stage", list(Stage))
def test_a_message_that_is_none_is_refused(node: Node, content: RecordDict, stage: Stage) -> None:
    assert decode(node.send(content, stage), Refusal) == Refusal("", "MessageError")


def test_a_request_of_another_stage_is_refused(node: Node) -> None:
    plan = make_plan_of()
    assert node.refusal(training(plan), Stage.EVALUATE) == Refusal("", "MessageError")


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": np.zeros(3, np.float32)},
        {"adapter": np.zeros((2, 2))},
        {"names": ("base.other.weight",)},
        {"names": ()},
        {"job": "{"},
        {"job": "{}"},
        {"round": -1},
    ],
    ids=["short", "matrix", "names", "no names", "json", "empty job", "negative"],
)
@pytest.mark.parametrize("head", ["shared", "local"])
def test_hostile_requests_are_refused_and_the_site_goes_on(
    node: Node, changes: dict[str, Any], head: str
) -> None:
    plan = make_plan_of(head=head)
    good = content_bytes(node.ask(training(plan), Stage.TRAIN))
    said = node.refusal(training(plan, **changes), Stage.TRAIN)
    assert said.session == SESSION
    assert content_bytes(node.ask(training(plan), Stage.TRAIN)) == good


# Silence


def silent(record: RecordDict, log: pytest.LogCaptureFixture) -> None:
    assert SECRET.encode() not in content_bytes(record)
    assert SECRET not in log.text
    assert all(SECRET not in repr(entry.__dict__) for entry in log.records)


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, MemoryError, RuntimeError])
def test_the_text_of_an_exception_stays_unsaid(
    node: Node,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(participant: Participant, request: TrainRequest) -> None:
        try:
            int(SECRET)
        except ValueError:
            raise error(SECRET)  # noqa: B904  # chained on purpose: the cause quotes data, too

    monkeypatch.setattr(Participant, "splits", fail)
    record = node.ask(training(make_plan_of()), Stage.TRAIN)
    assert decode(record, Refusal) == Refusal(SESSION, error.__name__)
    silent(record, caplog)
    # The site's own log says what and where.
    assert error.__name__ in caplog.text
    assert "test_app.py" in caplog.text and "in fail" in caplog.text


def test_a_row_that_is_wrong_is_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Its label column holds what should be nowhere else.
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "train.csv").write_text(f"image,label\na.png,{SECRET}\n")
    node = Node(tmp_path, str(tmp_path / "train.csv"))
    record = node.ask(make_plan_of().request, Stage.PLAN)
    assert decode(record, Refusal) == Refusal(SESSION, "DataError")
    assert "DataError" in caplog.text or "refused" in caplog.text
    silent(record, caplog)


def test_a_damaged_state_is_a_refusal(node: Node, tmp_path: Path) -> None:
    plan = make_plan_of(head="local")
    node.ask(training(plan), Stage.TRAIN)
    (kept,) = (tmp_path / "state" / SESSION).iterdir()
    kept.write_bytes(kept.read_bytes()[:20])
    said = node.refusal(training(plan, round=2), Stage.TRAIN)
    assert said.session == SESSION and said.code


def test_a_node_that_was_not_set_up_refuses(node: Node) -> None:
    node.config = {}
    assert node.refusal(make_plan_of().request, Stage.PLAN) == Refusal("", "KeyError")


def test_a_site_file_that_is_missing_is_a_refusal_without_its_path(
    node: Node, tmp_path: Path
) -> None:
    node.config = {"site": str(tmp_path / "nowhere" / "site.toml")}
    record = node.ask(make_plan_of().request, Stage.PLAN)
    assert decode(record, Refusal) == Refusal("", "JobError")
    assert str(tmp_path).encode() not in content_bytes(record)


# Secure aggregation


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(), sites=4)


def test_a_site_in_a_federation_refuses_a_job_that_would_have_updates_in_clear(
    tmp_path: Path, consortium: Consortium
) -> None:
    clear = Consortium(tmp_path / "clear", make_job(masked=False))
    node = Seat(consortium.node("ash"))
    assert node.code(clear.plan.request, "plan") == "secure-aggregation-required"


@pytest.mark.parametrize("masked", [True, False], ids=["masked job", "clear job"])
@pytest.mark.parametrize("federation", [True, False], ids=["federation", "no federation"])
def test_what_must_be_masked_is_never_sent_in_clear(
    tmp_path: Path, masked: bool, federation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Consortium(tmp_path / "member", make_job(validation=0.25))
    asking = Consortium(tmp_path / "asking", make_job(validation=0.25, masked=masked))
    config = member.node("ash")
    if not federation:
        del config["federation"]
    node = Seat(config)
    if not masked and not federation:  # nobody asks for masks: this is what it then does
        assert isinstance(node.ask(asking.training(), "train"), TrainReply)
        return
    monkeypatch.delattr(Participant, "train")  # it must not come to this
    monkeypatch.delattr(Participant, "evaluate")
    assert node.code(asking.training(), "train") == "secure-aggregation-required"
    assert node.code(asking.evaluating(), "evaluate") == "secure-aggregation-required"


def spoil_config(consortium: Consortium, node: Seat) -> None:
    del node.config["federation"]


def spoil_roster(consortium: Consortium, node: Seat) -> None:
    sites = {site: key for site, key in consortium.known.sites.items() if site != "ash"}
    (consortium.folder / FILE).write_text(dump_federation(Federation(sites=sites)))


def spoil_key(consortium: Consortium, node: Seat) -> None:
    (consortium.folder / "ash" / IDENTITY).unlink()
    make_identity(consortium.folder / "ash")


def spoil_identity(consortium: Consortium, node: Seat) -> None:
    (consortium.folder / "ash" / IDENTITY).unlink()


def spoil_mode(consortium: Consortium, node: Seat) -> None:
    (consortium.folder / "ash" / IDENTITY).chmod(stat.S_IRUSR | stat.S_IRGRP)


def spoil_file(consortium: Consortium, node: Seat) -> None:
    (consortium.folder / FILE).write_text("[sites")


MEMBERSHIP = [
    (spoil_config, "no-federation", "abstained"),
    (spoil_roster, "not-in-roster", "terms-refused"),
    (spoil_key, "not-in-roster", "terms-refused"),
    (spoil_identity, "InputError", "abstained"),
    (spoil_mode, "InputError", "abstained"),
    (spoil_file, "JobError", "abstained"),
]


@pytest.mark.parametrize(("spoil", "at_plan", "at_keys"), MEMBERSHIP)
def test_a_site_that_is_no_member_takes_no_part(
    consortium: Consortium, spoil: Any, at_plan: str, at_keys: str
) -> None:
    node = Seat(consortium.node("ash"))
    spoil(consortium, node)
    assert node.code(consortium.plan.request, "plan") == at_plan
    assert node.code(Talk(consortium).keys, "keys") == at_keys
    assert node.memory is None
