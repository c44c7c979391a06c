"""What a guard lets out of an evaluation: exact counts, and a sum of losses that tells the mean."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.trainings import LABELS, digits

from fedgraft.client.objectives import Labels
from fedgraft.client.policy.guard import Guard
from fedgraft.client.policy.reasons import last_reasons
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.messages.payloads import EvaluateReply, EvaluateRequest, Refusal
from fedgraft.common.metrics.tag_evaluation import TagEvaluation
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.tasks.regression import NumberEvaluation

SESSION = "0123456789abcdef" * 2
COUNT, LOSS = 200, 2.034
POLICY = """
[metrics]
allowed = ["loss", "accuracy", "f1", "scores", "groups"]
round_to = 2
"""


def make_job(task: str, *labels: str, **more: Any) -> Job:
    raw = {
        "job": {"name": "j", "task": task, "labels": list(labels)},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "head"},
    }
    return parse_job(raw | more, where="test")


def numbers(job: Job) -> Tally:
    true = np.linspace(0, 1, COUNT)
    return NumberEvaluation(COUNT * LOSS, true, true[::-1] / 2, 125.0).tally


def tags(job: Job) -> Tally:
    entities = np.tile(np.array([[[1, 3, 2]]]), (COUNT // 4, 1, 1))
    counted = np.full(COUNT // 4, 4)
    return TagEvaluation(
        4 * LOSS * np.ones(COUNT // 4), counted - 1, counted, entities, ("x",)
    ).tally


def labels(job: Job) -> Tally:
    examples = digits(COUNT)
    if job.data.groups:
        examples = replace(examples, groups=np.arange(COUNT) % 3 - 1)
    logits = torch.randn(COUNT, 10, generator=torch.Generator().manual_seed(1))
    collector = job.measures.collect(examples)
    found = Labels().counts(logits, torch.from_numpy(examples.labels))
    collector.add(np.arange(COUNT), found)
    tally: Tally = collector.evaluation().tally
    return replace(tally, loss=COUNT * LOSS)


CASES = {
    "numbers": (make_job("text-regression", data={"lowest": 0, "highest": 125}), numbers),
    "tags": (make_job("token-classification", "O", "B-x", "I-x"), tags),
    "labels": (make_job("image-classification", *LABELS), labels),
    "scores": (
        make_job("image-classification", *LABELS, evaluation={"score_bins": 20}), labels
    ),
    "groups": (
        make_job("image-classification", *LABELS, data={"group": "sex", "groups": ["f", "m"]}),
        labels,
    ),
}  # fmt: skip


def released(job: Job, tally: np.ndarray[Any, Any], folder: Path) -> Any:
    """The reply that leaves a site that has agreed to the job."""
    (folder / "policy.toml").write_text(POLICY)
    guard = Guard(folder / "policy.toml", folder / "state")
    text = job.model_dump_json()
    guard.agreements.propose(SESSION, text, ("x",), {}, backbone="", ask=False)
    request = EvaluateRequest(SESSION, 1, text, ("x",), "validation", np.zeros(1, np.float32))
    return guard.release("evaluate", request, EvaluateReply(SESSION, 1, tally), 0)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_mean_loss_is_rounded_over_the_examples_whatever_else_is_counted(
    case: str, tmp_path: Path
) -> None:
    job, count = CASES[case]
    tally = count(job)
    assert tally.examples == COUNT
    told = released(job, tally.to_vector(), tmp_path)
    left = Tally.from_vector(told.tally, job.measures)
    assert left.mean_loss == pytest.approx(round(LOSS, 2), abs=1e-12)
    assert np.array_equal(left.counts, tally.counts)


def test_a_loss_that_is_not_finite_has_a_code_of_its_own(tmp_path: Path) -> None:
    job, count = CASES["numbers"]
    vector = count(job).to_vector()
    vector[0] = np.inf
    assert released(job, vector, tmp_path) == Refusal(SESSION, "loss-not-finite")
    (reason,) = last_reasons(tmp_path / "state", 9)
    assert (reason.code, reason.session) == ("loss-not-finite", SESSION)
