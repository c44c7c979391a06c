"""What a site agreed to is asked again when a round works: backbone, policy and amount of data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import transformers
from support.trainings import make_job

from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.training.trainer import train_together
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import SiteFailure
from fedgraft.common.messages.payloads import EvaluateRequest, TrainReply, TrainRequest
from fedgraft.server.plan import make_plan

SESSION = "ab" * 16


def draw(folder: Path, seed: int) -> None:
    """A backbone with weights of ``seed``, in the place of the one that was there."""
    source = make_job("bert").backbone.source.removeprefix("path:")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


class Site:
    """A site with a policy, which agrees to a job and then works for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw(folder / "backbone", 0)
        job = make_job("bert", training={"epochs": 1, "batch_size": 4})
        backbone = job.backbone.model_copy(
            update={"source": f"path:{folder / 'backbone'}", "weights": "pretrained"}
        )
        self.job: Job = job.model_copy(update={"backbone": backbone})
        self.write_rows(40)
        site = {"name": "a", "policy": "policy.toml", "data": {"train": "train.jsonl"}}
        (folder / "site.toml").write_text(tomli_w.dumps(site))
        self.allow()

    def allow(self, *, anything: bool = False, **privacy: Any) -> None:
        """Allow the backbone that is here now; with ``anything`` also one that may come."""
        digest = open_workbench(self.job).backbone.fingerprint
        name = str(self.folder / "backbone")
        allowed = {name: f"sha256:{digest}"}
        if anything:  # the person allows both versions, but agrees to a job with the first
            draw(self.folder / "backbone", 1)
            other = open_workbench(self.job).backbone.fingerprint
            allowed["backbone"] = f"sha256:{other}"
            draw(self.folder / "backbone", 0)
        rules = {"secure_aggregation": "allowed", "min_cohort": 1, "min_local_steps": 3}
        policy = {
            "model": {"allowed_backbones": allowed, "allowed_methods": ["lora"]},
            "privacy": rules | {"min_examples": 20} | privacy,
            "metrics": {"allowed": ["loss", "accuracy", "f1"]},
            "approval": {"mode": "auto"},
        }
        (self.folder / "policy.toml").write_text(tomli_w.dumps(policy))

    def write_rows(self, count: int) -> None:
        rows = (json.dumps({"text": f"w {i}", "label": "0"}) + "\n" for i in range(count))
        (self.folder / "train.jsonl").write_text("".join(rows))

    def opened(self) -> Participant:
        """The site as every message finds it."""
        node = {"site": str(self.folder / "site.toml"), "state": str(self.folder / "state")}
        return open_participant({**node, "device": "cpu"})

    def agree(self) -> None:
        bench = open_workbench(self.job)
        self.request = make_plan(self.job, bench, SESSION).request
        self.adapter = bench.initial_of(bench.layout.only(self.request.names))
        self.opened().agree(self.request)

    def train(self) -> TrainReply:
        plan = self.request
        ask = TrainRequest(SESSION, 1, 0, plan.job, plan.names, self.adapter)
        reply = train_together([self.opened().train(ask)])[0]
        assert isinstance(reply, TrainReply)
        return reply

    def evaluate(self) -> int:
        plan = self.request
        ask = EvaluateRequest(SESSION, 1, plan.job, plan.names, "validation", self.adapter)
        return self.opened().tally(ask).examples


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def code_of(work: Any) -> str:
    with pytest.raises(SiteFailure) as caught:
        work()
    return caught.value.code


def test_what_was_agreed_to_is_done(site: Site) -> None:
    site.agree()
    assert site.train().examples > 20
    assert site.evaluate() > 0


@pytest.mark.parametrize("anything", [False, True])
def test_with_other_weights_nothing_is_trained_or_measured(site: Site, anything: bool) -> None:
    """Also where the policy allows those other weights: nobody agreed to this job with them."""
    site.allow(anything=anything)
    site.agree()
    draw(site.folder / "backbone", 1)
    assert code_of(site.train) == "backbone-differs"
    assert code_of(site.evaluate) == "backbone-differs"
    draw(site.folder / "backbone", 0)
    assert site.train().examples > 20


def test_the_job_can_be_agreed_to_again_with_the_other_weights(site: Site) -> None:
    site.agree()
    draw(site.folder / "backbone", 1)
    site.allow()
    assert code_of(site.train) == "backbone-differs"
    site.agree()
    assert site.train().examples > 20


def test_a_backbone_that_the_policy_takes_back_is_not_used(site: Site) -> None:
    site.agree()
    text = (site.folder / "policy.toml").read_text()
    digest = open_workbench(site.job).backbone.fingerprint
    (site.folder / "policy.toml").write_text(text.replace(digest, "0" * 64))
    assert code_of(site.train) == "policy-backbone"


def test_an_agreement_of_an_earlier_version_is_held_to_the_policy(site: Site) -> None:
    site.agree()
    (file,) = (site.folder / "state" / "approvals").glob("*.json")
    told = json.loads(file.read_text())
    del told["backbone"]
    file.write_text(json.dumps(told))
    assert site.train().examples > 20
    draw(site.folder / "backbone", 1)
    assert code_of(site.train) == "policy-backbone"


def test_rows_that_are_gone_are_noticed(site: Site) -> None:
    site.agree()
    site.write_rows(10)
    assert code_of(site.train) == "policy-examples"


def test_too_few_steps_are_noticed(site: Site) -> None:
    site.allow(min_examples=1)
    site.agree()
    site.write_rows(6)
    assert code_of(site.train) == "policy-steps"


def test_a_larger_bound_counts_from_the_next_round(site: Site) -> None:
    site.agree()
    site.allow(min_examples=100)
    assert code_of(site.train) == "policy-examples"


def test_where_updates_are_masked_the_code_does_not_tell_the_amount(site: Site) -> None:
    secure = site.job.privacy.secure_aggregation.model_copy(update={"enabled": True})
    privacy = site.job.privacy.model_copy(update={"secure_aggregation": secure})
    guard = site.opened().guard
    assert guard is not None
    job = site.job.model_copy(update={"privacy": privacy})
    site.allow(max_colluding=0)
    assert code_of(lambda: guard.check_amount(job, 3, 3)) == "not-eligible"


def test_a_pass_is_of_one_backbone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are replaced between the examples and the model stop the round."""
    site.agree()
    real = Participant.stack

    def replaced(self: Participant, job: Job) -> Any:
        stack = real(self, job)
        draw(site.folder / "backbone", 1)
        return stack

    monkeypatch.setattr(Participant, "stack", replaced)
    assert code_of(site.train) == "backbone-differs"
