"""A policy's least number of examples is of texts: one long text is one person's, however cut."""

import json
from pathlib import Path

import pytest
import tomli_w
from support.language_models import job_settings, save_language_model

from fedgraft.client.participant import open_participant
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import SiteFailure
from fedgraft.server.plan import make_plan

SESSION = "0" * 32


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_one_long_text_is_one_example_for_the_policy(kind: str, tmp_path: Path) -> None:
    backbone = save_language_model(kind, tmp_path / "backbone")
    job = parse_job(job_settings(kind, backbone, str(tmp_path / "*.jsonl")), where="test")
    bench = open_workbench(job)
    policy = {
        "model": {
            "allowed_backbones": {"backbone": f"sha256:{bench.backbone.fingerprint}"},
            "allowed_methods": ["lora"],
        },
        "privacy": {
            "secure_aggregation": "allowed",
            "min_cohort": 1,
            "min_examples": 5,
            "min_local_steps": 1,
        },
        "limits": {},
        "metrics": {"allowed": ["loss", "accuracy", "f1"]},
        "approval": {"mode": "auto"},
    }
    (tmp_path / "policy.toml").write_text(tomli_w.dumps(policy))
    site = {"name": "ash", "policy": "policy.toml", "data": {"train": "train.jsonl"}}
    (tmp_path / "site.toml").write_text(tomli_w.dumps(site))
    request = make_plan(job, bench, SESSION).request

    def agree(*texts: str) -> None:
        rows = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "train.jsonl").write_text("".join(rows))
        node = {"site": str(tmp_path / "site.toml"), "state": str(tmp_path / "state")}
        open_participant({**node, "device": "cpu"}).agree(request)

    with pytest.raises(SiteFailure) as caught:
        agree("the quick brown fox " * 60, "and so on")
    assert caught.value.code == "policy-examples"
    agree(*(f"{letter} short text" for letter in "abcdefghijklmnop"))
