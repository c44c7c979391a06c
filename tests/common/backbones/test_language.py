"""What a job of tokens must not ask for, and what it may."""

from pathlib import Path
from typing import Any

import pytest
from support.language_models import job_settings

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import JobError


def parse(kind: str = "gpt2", **changes: dict[str, Any]) -> Job:
    raw = job_settings(kind, Path("nowhere"), "*.txt")
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_job(raw, where="test")


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"job": {"labels": ["a", "b"]}}, "has no labels"),
        ({"method": {"head": "shared"}}, "backbone's own"),
        ({"method": {"head": "local"}}, "backbone's own"),
        ({"evaluation": {"score_bins": 100}}, "neither scores nor groups"),
        ({"data": {"group": "sex", "groups": ["f", "m"]}}, "neither scores nor groups"),
        ({"training": {"dropout": 0.1}}, "frozen"),
        ({"rounds": {"early_stopping": {"metric": "macro_f1"}}}, "no macro_f1"),
        ({"simulation": {"partition": {"kind": "dirichlet"}, "sites": 2}}, "deals labels"),
        ({"simulation": {"faults": {"poison": "labels", "poisoned": 0.5}}}, "wrong labels"),
    ],
)
def test_what_only_labels_have_is_refused_with_a_hint(
    kind: str, changes: dict[str, dict[str, Any]], told: str
) -> None:
    with pytest.raises(JobError, match=told) as caught:
        parse(kind, **changes)
    assert caught.value.hint


def test_only_the_backbones_own_head_predicts_tokens() -> None:
    raw = job_settings("gpt2", Path("nowhere"), "*.txt")
    raw["method"] = {"kind": "head"}
    with pytest.raises(JobError, match="backbone's own"):
        parse_job(raw, where="test")


def test_the_rest_of_a_job_is_as_ever() -> None:
    job = parse(
        rounds={"early_stopping": {"metric": "accuracy"}},
        method={"dropout": 0.1},
        simulation={"partition": {"kind": "iid"}, "sites": 3},
        privacy={"secure_aggregation": {"enabled": True}},
    )
    assert job.measures.most_parts == 32 and job.measures.classes == 2
    assert job.for_sites().simulation is None
