"""The door of a site with a policy, by real handlers: checked, agreed, recorded, or not sent."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.guarded import Guarded
from support.masked_federations import SESSION, Consortium, make_job
from support.masked_talk import Talk

from fedgraft.client.participant import Participant
from fedgraft.client.policy import message_log
from fedgraft.common.errors import AuditError
from fedgraft.common.federation.audit_log import Audit
from fedgraft.common.messages.codec import encode, parts, wire_bytes
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    KeysAsk,
    MaskedTrain,
    PlanReply,
    Refusal,
    TrainReply,
)
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.secagg.statements import MaskedInput, Survivors

SECRET = "patient Ada Lovelace"
ALLOWED = {"secure_aggregation": "allowed", "min_cohort": 1}


@pytest.fixture
def clear(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(masked=False, validation=0.25, count=4))


@pytest.fixture
def masked(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(validation=0.25), sites=4)


def open_node(consortium: Consortium, **changes: Any) -> Guarded:
    """A site that may send in clear and has agreed."""
    node = Guarded(consortium, privacy=ALLOWED, **changes)
    assert isinstance(node.ask(consortium.plan.request, "plan"), PlanReply)
    return node


# What is recorded


def test_every_message_of_a_clear_round_is_recorded(clear: Consortium) -> None:
    node = open_node(clear)
    request = clear.training()
    update = node.ask(request, "train")
    assert isinstance(update, TrainReply)
    assert isinstance(node.ask(clear.evaluating(), "evaluate"), EvaluateReply)
    lines = node.lines
    assert [(line["stage"], line["direction"], line["decision"]) for line in lines] == [
        ("query.plan", "in", "received"),
        ("query.plan", "out", "sent"),
        ("train", "in", "received"),
        ("train", "out", "sent"),
        ("evaluate", "in", "received"),
        ("evaluate", "out", "sent"),
    ]
    assert {line["run"] for line in lines} == {SESSION}
    assert [line["round"] for line in lines] == [0, 0, 1, 1, 1, 1]
    came, went = lines[2], lines[3]
    assert came["tensors"][0]["sha256"] == hashlib.sha256(request.adapter.tobytes()).hexdigest()
    assert went["bytes"] == wire_bytes(encode(update))
    layout = clear.plan.exchanged
    assert [entry["name"] for entry in went["tensors"]] == list(layout.names)
    for entry, shape in zip(went["tensors"], layout.shapes, strict=True):
        part = update.update[layout.slices[entry["name"]]]
        assert entry["shape"] == list(shape) and entry["dtype"] == "float32"
        assert entry["bytes"] == part.nbytes
        assert entry["sha256"] == hashlib.sha256(part.tobytes()).hexdigest()
    assert went["norm_before"] == went["norm_after"] == float(np.linalg.norm(update.update))
    assert went["epsilon"] is None and len(went["policy"]) == 64


def test_what_was_sent_is_kept_for_some_rounds(clear: Consortium) -> None:
    node = open_node(clear, limits={"keep_sent": 2})
    for number in (1, 2, 3):
        said = node.ask(replace(clear.training(), round=number), "train")
    assert [path.parent.name for path in node.sent] == ["000002", "000003"]
    with np.load(node.sent[-1]) as kept:
        assert np.array_equal(kept["update"], said.update)
        assert kept["payload"] == dict(parts(encode(said)))["payload"]


def test_nothing_is_kept_where_nothing_is_to_be_kept(clear: Consortium) -> None:
    node = open_node(clear, limits={"keep_sent": 0})
    node.ask(clear.training(), "train")
    assert not node.sent and ("train", "sent", "") in node.said


def test_a_masked_round_is_recorded_stage_by_stage(masked: Consortium) -> None:
    nodes = {name: Guarded(masked, name) for name in masked.names}
    for node in nodes.values():
        assert isinstance(node.ask(masked.plan.request, "plan"), PlanReply)
    Talk(masked, nodes=dict(nodes)).finish()
    lines = [line for line in nodes["ash"].lines if line["direction"] == "out"]
    stages = ["query.plan", "query.keys", "query.shares", "train", "query.confirm", "query.unmask"]
    assert [line["stage"] for line in lines] == stages
    assert [line["round"] for line in lines] == [0, 1, 1, 1, 1, 1]
    (entry,) = lines[3]["tensors"]
    assert entry["name"] == "masked" and entry["dtype"] == "uint8"
    assert lines[3]["norm_before"] is None
    (kept,) = nodes["ash"].sent  # the vector alone, not what opens anything
    assert kept.name.startswith("train-")


def test_losses_leave_rounded(clear: Consortium) -> None:
    node = open_node(clear, metrics={"round_to": 1})
    update = node.ask(clear.training(), "train")
    tally = node.ask(clear.evaluating(), "evaluate").tally
    exact = clear.trained("ash")
    assert update.loss == round(exact.loss, 1) != exact.loss
    mean = Tally.from_vector(tally, clear.job.measures).mean_loss
    assert mean == pytest.approx(round(mean, 1), abs=1e-12)
    assert np.array_equal(update.update, exact.update)


# What is refused, at every stage


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": {"allowed_backbones": {}}}, "policy-backbone"),
        ({"model": {"allowed_methods": ["head"]}}, "policy-method"),
        ({"privacy": {"secure_aggregation": "required"}}, "policy-secure-aggregation"),
        ({"privacy": {"min_cohort": 2}}, "policy-cohort"),
        ({"privacy": {"min_examples": 200}}, "policy-examples"),
        ({"privacy": {"min_local_steps": 9}}, "policy-steps"),
        ({"limits": {"max_rounds": 3}}, "policy-rounds"),
        ({"limits": {"max_bytes_out_per_round": 100}}, "policy-bytes"),
        ({"metrics": {"allowed": ["loss"]}}, "policy-metrics"),
        ({"approval": {"mode": "ask"}}, "approval-pending"),
    ],
)
def test_a_job_outside_the_policy_is_refused_and_recorded(
    clear: Consortium, changes: dict[str, Any], code: str
) -> None:
    node = Guarded(clear, privacy=ALLOWED)
    node.rule(**changes)
    assert node.code(clear.plan.request, "plan") == code
    assert node.said == [("query.plan", "refused", code)]
    assert node.code(clear.training(), "train") in (code, "not-agreed")


def test_a_policy_that_became_stricter_holds_at_once(clear: Consortium) -> None:
    node = open_node(clear)
    assert isinstance(node.ask(clear.training(), "train"), TrainReply)
    node.rule(limits={"max_rounds": 3})
    assert node.code(clear.training(), "train") == "policy-rounds"
    node.rule(limits={"max_rounds": 9}, metrics={"allowed": []})
    assert node.code(clear.training(), "train") == "policy-metrics"


def test_a_round_beyond_the_job_is_refused(clear: Consortium) -> None:
    node = open_node(clear)
    assert node.code(replace(clear.training(), round=5), "train") == "policy-rounds"


def test_the_bytes_of_a_round_are_counted_together(clear: Consortium) -> None:
    node = open_node(clear)
    size = wire_bytes(encode(node.ask(clear.training(), "train")))
    node.rule(limits={"max_bytes_out_per_round": 2 * size})
    assert isinstance(node.ask(clear.training(), "train"), TrainReply)
    assert node.code(clear.training(), "train") == "policy-bytes"
    assert isinstance(node.ask(replace(clear.training(), round=2), "train"), TrainReply)
    assert node.code(clear.training(), "train") == "policy-bytes"  # and nothing was forgotten


def test_another_job_or_other_tensors_under_a_session_are_refused(clear: Consortium) -> None:
    node = open_node(clear)
    request = clear.training()
    longer = request.job.replace('"epochs":1', '"epochs":2')
    fewer = clear.plan.exchanged.only(request.names[1:])
    part = clear.plan.exchanged.part(request.adapter, fewer)
    assert longer != request.job
    assert node.code(replace(request, job=longer), "train") == "not-agreed"
    assert node.code(replace(request, names=fewer.names, adapter=part), "train") == "not-agreed"
    assert node.code(replace(request, session="ab" * 16), "train") == "not-agreed"
    assert node.code(replace(request, session="../x"), "train") == "bad-session"
    assert [line["run"] for line in node.lines][-1] == ""


def test_masked_terms_below_the_policy_are_refused(masked: Consortium) -> None:
    node = Guarded(masked)
    node.ask(masked.plan.request, "plan")
    ask = Talk(masked).keys
    assert node.code(replace(ask, cohort=(0, 1)), "keys") == "policy-cohort"
    two = ConfirmAsk(SESSION, Survivors((0, 1, 2), (0, 1), (bytes(64), bytes(64))))
    assert node.code(two, "confirm") == "policy-cohort"
    other = replace(ask.work, job=ask.work.job.replace('"epochs":1', '"epochs":2'))
    assert node.code(KeysAsk(SESSION, other, ask.cohort, ask.request), "keys") == "not-agreed"


@pytest.mark.parametrize("rule", ["min_examples", "min_local_steps"])
def test_a_masked_job_is_not_told_what_is_wrong_with_the_data(
    masked: Consortium, rule: str
) -> None:
    node = Guarded(masked, privacy={rule: 200})
    assert node.code(masked.plan.request, "plan") == "not-eligible"


def test_a_policy_that_cannot_be_read_allows_nothing(clear: Consortium) -> None:
    node = open_node(clear)
    (node.folder / "policy.toml").write_text("[limits")
    assert node.code(clear.training(), "train") == "JobError"
    assert node.said[-1] == ("train", "refused", "JobError")
    (node.folder / "policy.toml").unlink()
    assert node.code(clear.training(), "train") == "JobError"


def test_a_message_that_is_none_is_recorded(clear: Consortium) -> None:
    node = open_node(clear)
    assert node.code(clear.training(), "evaluate") == "MessageError"
    assert node.said[-1] == ("evaluate", "refused", "MessageError")


# What cannot be recorded does not leave


def fail(*_: object, **__: object) -> None:
    raise AuditError("no space left")


def fail_with_errno(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


def test_nothing_is_trained_where_nothing_can_be_recorded(
    clear: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = open_node(clear)
    monkeypatch.setattr(Audit, "append", fail)
    monkeypatch.delattr(Participant, "train")
    assert node.code(clear.training(), "train") == "audit-failed"


@pytest.mark.parametrize(
    ("name", "broken"), [("_write", fail), ("_store", fail_with_errno)], ids=["audit", "sent"]
)
def test_a_reply_that_cannot_be_recorded_stays(
    clear: Consortium, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = open_node(clear)
    train = Participant.train

    def train_then_break(at: Participant, request: Any) -> Any:
        said = yield from train(at, request)
        monkeypatch.setattr(message_log.MessageLog, name, broken)
        return said

    monkeypatch.setattr(Participant, "train", train_then_break)
    assert node.code(clear.training(), "train") == "audit-failed"
    monkeypatch.undo()
    assert ("train", "sent", "") not in node.said
    assert isinstance(node.ask(clear.training(), "train"), TrainReply)


def test_an_audit_that_somebody_changed_stops_the_site(clear: Consortium) -> None:
    node = open_node(clear)
    content = node.audit.read_bytes()
    node.audit.write_bytes(content.replace(b'"sent"', b'"kept"'))
    assert node.code(clear.training(), "train") == "audit-failed"
    node.audit.write_bytes(content)
    assert isinstance(node.ask(clear.training(), "train"), TrainReply)


def test_a_masked_input_that_cannot_be_recorded_ends_the_round(
    masked: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {name: Guarded(masked, name) for name in masked.names}
    for node in nodes.values():
        node.ask(masked.plan.request, "plan")
    asks = Talk(masked, nodes=dict(nodes)).until("train")
    assert isinstance(asks["ash"], MaskedTrain)
    monkeypatch.setattr(message_log.MessageLog, "sent", fail)
    assert nodes["ash"].code(asks["ash"], "train") == "audit-failed"
    assert nodes["ash"].memory is None
    monkeypatch.undo()
    assert isinstance(nodes["beech"].ask(asks["beech"], "train"), MaskedInput)


# Canary


def test_nothing_that_is_recorded_or_sent_quotes_data_or_exceptions(
    clear: Consortium, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("fedgraft"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    node = open_node(clear)
    node.ask(clear.training(), "train")

    def quote(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(Participant, "splits", quote)
    assert node.code(clear.training(), "train") == "ValueError"
    monkeypatch.undo()
    table = node.folder / "train.csv"
    table.write_text(f"image,label\na.png,{SECRET}\n")
    text = node.site.read_text()
    (node.folder / "other.toml").write_text(
        "\n".join(line if "train =" not in line else f'train = "{table}"' for line in
                  text.splitlines())
    )  # fmt: skip
    node.config["site"] = str(node.folder / "other.toml")
    said = node.ask(clear.plan.request, "plan")
    assert isinstance(said, Refusal) and SECRET not in str(said)
    assert SECRET not in caplog.text
    written = [path for path in node.place.rglob("*") if path.is_file()]
    assert node.audit in written and node.sent
    assert not any(SECRET.encode() in path.read_bytes() for path in written)
