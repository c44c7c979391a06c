"""A person's word on jobs, and what a person can see of the audit."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from click.testing import Result
from support.guarded import Guarded
from support.masked_federations import SESSION, Consortium, make_job
from typer.testing import CliRunner

from fedgraft.client.cli.approve import approve
from fedgraft.client.cli.audit import audit
from fedgraft.client.policy.approvals import Agreements
from fedgraft.client.policy.disclosure import Disclosure
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import AuditError, InputError, SiteFailure
from fedgraft.common.federation.audit_log import Audit
from fedgraft.common.messages.payloads import PlanReply, TrainReply


@pytest.fixture
def clear(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(masked=False))


@pytest.fixture
def node(clear: Consortium) -> Guarded:
    node = Guarded(
        clear,
        privacy={"secure_aggregation": "allowed", "min_cohort": 1},
        approval={"mode": "ask"},
    )
    assert node.code(clear.plan.request, "plan") == "approval-pending"
    return node


def run(verb: object, node: Guarded, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(verb)  # type: ignore[type-var]
    result = CliRunner().invoke(app, ["--site", str(node.site), *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_job_waits_until_a_person_approves_it(clear: Consortium, node: Guarded) -> None:
    listed = run(approve, node, "--json").stdout
    (waiting,) = json.loads(listed)["pending"]
    assert waiting["run"] == SESSION and "in clear" in waiting["leaving"]
    assert SESSION in run(approve, node).stdout
    assert node.code(clear.training(), "train") == "not-agreed"
    shown = run(approve, node, SESSION[:6], "--yes").output
    assert "Would leave" in shown and "builtin:glyph-vit" in shown
    assert isinstance(node.ask(clear.plan.request, "plan"), PlanReply)
    assert isinstance(node.ask(clear.training(), "train"), TrainReply)
    assert [line["decision"] for line in node.lines if line["stage"] == "approve"] == ["approved"]
    assert json.loads(run(approve, node, "--json").stdout) == {"pending": []}


def test_a_denied_job_stays_denied(clear: Consortium, node: Guarded) -> None:
    run(approve, node, SESSION, "--deny", "--yes")
    assert node.code(clear.plan.request, "plan") == "approval-denied"
    node.rule(approval={"mode": "auto"})
    assert node.code(clear.plan.request, "plan") == "approval-denied"
    run(approve, node, SESSION, "--yes")
    assert isinstance(node.ask(clear.plan.request, "plan"), PlanReply)


def test_an_approval_binds_the_job(clear: Consortium, node: Guarded) -> None:
    run(approve, node, SESSION, "--yes")
    other = replace(
        clear.plan.request, job=clear.plan.request.job.replace('"epochs":1', '"epochs":2')
    )
    assert node.code(other, "plan") == "approval-pending"
    assert node.code(clear.training(), "train") == "not-agreed"


def test_what_a_policy_agreed_to_alone_is_asked_about_once_it_asks(clear: Consortium) -> None:
    node = Guarded(clear, privacy={"secure_aggregation": "allowed", "min_cohort": 1})
    assert isinstance(node.ask(clear.plan.request, "plan"), PlanReply)
    node.rule(approval={"mode": "ask"})
    assert node.code(clear.training(), "train") == "not-agreed"
    assert node.code(clear.plan.request, "plan") == "approval-pending"
    node.rule(approval={"mode": "auto"})
    assert isinstance(node.ask(clear.plan.request, "plan"), PlanReply)


def test_a_run_must_be_named_unmistakably(clear: Consortium, node: Guarded) -> None:
    with pytest.raises(InputError, match="no job ff"):
        run(approve, node, "ff", "--yes")
    twin = replace(clear.plan.request, session=SESSION[:8] + "f" * 24)
    assert node.code(twin, "plan") == "approval-pending"
    with pytest.raises(InputError, match="2 jobs begin with"):
        run(approve, node, SESSION[:8], "--yes")


def test_nothing_is_decided_without_a_yes(node: Guarded) -> None:
    with pytest.raises(InputError, match="nothing was decided"):
        run(approve, node, SESSION)
    assert node.approval(SESSION)["status"] == "pending"


def test_a_job_without_labels_is_described_without_them(node: Guarded) -> None:
    raw = {
        "job": {"name": "j", "task": "causal-lm"},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "lora", "rank": 1, "head": "frozen"},
    }
    leaving = Disclosure(("x",), 1, 1, 1, masked=False).to_json()
    job = parse_job(raw, where="test").model_dump_json()
    with pytest.raises(SiteFailure):
        Agreements(node.place / "approvals").propose(
            "f" * 32, job, ("x",), leaving, backbone="", ask=True
        )
    told = run(approve, node, "f" * 32, "--yes").output
    assert "Job j: causal-lm.\n" in told


# The audit


def test_the_audit_is_shown_checked_and_exported(clear: Consortium, node: Guarded) -> None:
    run(approve, node, SESSION, "--yes")
    node.ask(clear.plan.request, "plan")
    node.ask(clear.training(), "train")
    shown = json.loads(run(audit, node, "--json", "--round", "1").stdout)["lines"]
    assert [line["stage"] for line in shown] == ["train", "train"]
    told = run(audit, node).stdout.splitlines()
    assert len(told) == 7 and "train out  sent" in told[-1]
    head = Audit(node.audit).head
    known = f"{head.lines}:{head.hash}"
    checked = json.loads(run(audit, node, "--verify", "--head", known, "--json").stdout)
    assert checked == {"lines": 7, "head": known, "compared": True}
    table = list(csv.DictReader(io.StringIO(run(audit, node, "--export", "csv").stdout)))
    names = [row["tensors.name"] for row in table if row["direction"] == "out"]
    assert set(names) >= set(clear.plan.exchanged.names)
    lines = run(audit, node, "--export", "jsonl").stdout.splitlines()
    assert lines == node.audit.read_text().splitlines()


def test_a_changed_audit_is_named(node: Guarded) -> None:
    node.audit.write_bytes(node.audit.read_bytes().replace(b"received", b"deceived"))
    with pytest.raises(AuditError, match="line 1 "):
        run(audit, node, "--verify")


@pytest.mark.parametrize(
    "arguments", [("--export", "xml"), ("--head", "1:ab"), ("--verify", "--head", "1:ab")]
)
def test_bad_options_are_named(node: Guarded, arguments: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        run(audit, node, *arguments)
    assert caught.value.hint
