"""A site's own people read why it refused; the coordinator gets a code and nothing else."""

import json
import logging
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.guarded import Guarded
from support.masked_federations import Consortium, make_job
from typer.testing import CliRunner

from fedgraft.client.cli.doctor import doctor
from fedgraft.client.cli.status import status
from fedgraft.client.policy.policy_file import RULES, Policy, RoundFacts, _rules, _told
from fedgraft.client.policy.reasons import KEPT, explain, keep_reason, last_reasons
from fedgraft.common.config.jobfile import dump_job
from fedgraft.common.errors import DataError, SiteFailure
from fedgraft.common.messages.codec import encode
from fedgraft.common.messages.payloads import Refusal

SECRET = "HIV positive, born 1961 in Ulm"
CLEAR = {
    "secure_aggregation": "allowed", "min_cohort": 1, "min_examples": 1, "min_local_steps": 1,
}  # fmt: skip


@pytest.fixture
def clear(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(masked=False, validation=0.25, count=4))


def broken(folder: Path, row: dict[str, Any]) -> Path:
    """A site's data whose second row is wrong."""
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"text": "a", "label": "x"}, row)))
    return path


def test_an_error_of_ours_is_told_whole_and_another_by_its_place_alone() -> None:
    assert explain(DataError("rows.csv, line 3: no label", hint="fill it in")) == (
        "rows.csv, line 3: no label",
        "fill it in",
    )
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        why, hint = explain(error)
    assert why.startswith("unexpected KeyError in test_reasons.py, line ") and SECRET not in why
    assert hint
    try:
        try:
            raise DataError("row 17: no text", hint="fill it in")
        except DataError as error:
            raise SiteFailure("abstained") from error
    except SiteFailure as failure:
        assert explain(failure) == ("row 17: no text", "fill it in")
    assert explain(SiteFailure("no-examples")) == ("", "")


def test_the_newest_reasons_are_kept_for_the_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for number in range(KEPT + 7):
        keep_reason(state, "train", "s", "DataError", DataError(f"row {number}: {'x' * 9000}"))
    kept = last_reasons(state, 999)
    assert len(kept) == KEPT and kept[-1].why.startswith(f"row {KEPT + 6}: x")
    assert (state / "reasons.jsonl").stat().st_size < KEPT * 2400
    assert stat.S_IMODE((state / "reasons.jsonl").stat().st_mode) == 0o600
    odd = json.dumps({name: 5 for name in ("at", "stage", "session", "code", "why", "hint")})
    (state / "reasons.jsonl").write_text(f'{{"half a line\n[1]\n{odd}\n')
    assert last_reasons(state, 5) == []


@pytest.mark.parametrize("stage", ["plan", "train"])
def test_the_reason_stays_and_the_code_leaves(
    stage: str, clear: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    node = Guarded(clear, privacy=CLEAR)
    request = clear.plan.request if stage == "plan" else clear.training()
    if stage == "train":
        node.ask(clear.plan.request, "plan")
    node.site.write_text(node.site.read_text().replace("train.parquet", "elsewhere.parquet"))
    with caplog.at_level(logging.INFO):
        assert node.code(request, stage) == "DataError"
    (reason,) = last_reasons(node.place, 1)
    assert (reason.code, reason.session) == ("DataError", clear.plan.session)
    assert "elsewhere.parquet" in reason.why and reason.hint
    assert reason.why in caplog.text and reason.hint in caplog.text
    left = encode(Refusal(reason.session, "DataError"))
    sent = str(left)
    assert "elsewhere" not in sent and reason.hint not in sent
    assert node.said[-1][1:] == ("refused", "DataError")
    assert "elsewhere" not in node.audit.read_text()


def test_the_rule_of_the_policy_is_named_with_its_value(clear: Consortium) -> None:
    node = Guarded(clear, privacy=CLEAR | {"min_examples": 5000})
    assert node.code(clear.plan.request, "plan") == "policy-examples"
    (reason,) = last_reasons(node.place, 1)
    assert "[privacy] min_examples = 5000; there are " in reason.why
    masked = Consortium(clear.folder / "masked", make_job(masked=True, validation=0.25, count=4))
    node = Guarded(masked, privacy={"min_examples": 5000})
    assert node.code(masked.plan.request, "plan") == "not-eligible"
    (reason,) = last_reasons(node.place, 1)
    assert "policy-examples: policy.toml has [privacy] min_examples = 5000" in reason.why
    facts = RoundFacts(clear.job, datetime(2026, 1, 1), examples=3, documents=2)
    for code, key in RULES.items():
        section, _, name = key.partition(".")
        assert f"policy-{code}: policy.toml has [{section}] {name} = " in _told(
            Policy(), facts, code
        )
    assert {code for code, _ in _rules(Policy(), facts)} == RULES.keys()


def test_status_and_doctor_show_them(clear: Consortium, tmp_path: Path) -> None:
    node = Guarded(clear, privacy=CLEAR)
    assert '"refusals": []' in call(status, "--site", node.site, "--json")
    keep_reason(
        node.place, "query.plan", "s", "DataError", DataError("t, row 4: no label", hint="do")
    )
    told = call(status, "--site", node.site)
    assert "t, row 4: no label" in told and "hint: do" in told and "query.plan  DataError" in told
    job = tmp_path / "job.toml"
    job.write_text(dump_job(clear.job))
    found = json.loads(call(doctor, "--site", node.site, "--job", job, "--json"))["findings"]
    by_name = {one["name"]: one for one in found}
    assert by_name["job"]["state"] == "ok" and "rows to train on" in by_name["job"]["what"]
    assert "row 4: no label" in by_name["refusals"]["hint"]
    node.site.write_text(node.site.read_text().replace("train.parquet", "elsewhere.parquet"))
    found = json.loads(call(doctor, "--site", node.site, "--job", job, "--json"))["findings"]
    (one,) = [one for one in found if one["name"] == "job"]
    assert one["state"] == "fail" and "elsewhere.parquet" in one["what"]


def call(verb: Any, *words: object) -> str:
    import typer

    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(word) for word in words]).output


@pytest.mark.parametrize("label", [SECRET, SECRET * 40, "seen by nobody at all"])
def test_a_long_label_may_be_a_text_and_is_not_repeated(label: str, tmp_path: Path) -> None:
    from support.trainings import make_job as make_small

    from fedgraft.client.data.rows import read_split

    with pytest.raises(DataError) as caught:
        read_split(str(broken(tmp_path, {"text": "b", "label": label})), named(make_small("bert")))
    assert label not in str(caught.value) + caught.value.hint
    assert f"label of {len(label)} characters is not in the job's list" in str(caught.value)


def named(job: Any) -> Any:
    return job.model_copy(update={"job": job.job.model_copy(update={"labels": ("x", "y")})})
