"""A teacher's logits are those of its model, computed once, and a student comes closer to them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.companies import Company, uneven
from support.federations import adapter_of, digits_job, run_digits
from support.trainings import digits, noisy, open_small, rows_for, settings, trained

from fedgraft.client.data import teacher
from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.cache import Store
from fedgraft.client.data.rows import read_split
from fedgraft.client.data.teacher import teacher_logits
from fedgraft.client.participant import open_participant
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError, JobError, SiteFailure
from fedgraft.common.examples import concatenate
from fedgraft.server.export.adapter import export_merged
from fedgraft.server.plan import make_plan
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.preparation import prepare

GLYPHS = "builtin:glyph-vit"
TAUGHT = (f"simulation.teacher={GLYPHS}", "training.distillation.weight=0.5")


def splits_of(job: Job) -> Any:
    node = make_nodes(job, prepare(job), states="", device="cpu")[0]
    return open_participant(node).splits(job)


def test_what_is_taught_is_what_the_model_says(tmp_path: Path) -> None:
    job = digits_job(*TAUGHT)
    splits = splits_of(job)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        open_workbench(job).backbone.folder
    ).eval()
    for part in (splits.train, splits.validation):
        with torch.inference_mode():
            wanted = model(**as_tensors(part.batch(np.arange(len(part))))).logits
        torch.testing.assert_close(torch.from_numpy(part.teacher_logits), wanted, rtol=0, atol=1e-4)
    assert (
        splits.test.teacher_logits is None and splits_of(digits_job()).train.teacher_logits is None
    )


def test_it_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = digits_job(*TAUGHT)
    rows = read_split(splits_of(job).config.data.train, job).dataset
    cpu = torch.device("cpu")
    first = teacher_logits(GLYPHS, rows, job, store=store(tmp_path), device=cpu)

    def never(*args: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(teacher, "load", never)
    again = teacher_logits(GLYPHS, rows, job, store=store(tmp_path, anew=False), device=cpu)
    np.testing.assert_array_equal(first, again)


_STORES: dict[Path, Store] = {}


def store(folder: Path, *, anew: bool = True) -> Store:
    if anew:
        _STORES[folder] = Store(folder, memory=10**8, disk=10**8)
    return _STORES[folder]


def test_a_teacher_that_does_not_know_the_labels_is_refused(tmp_path: Path) -> None:
    job = digits_job("simulation.teacher=builtin:glyph-vit", "training.distillation.weight=1")
    other = job.model_copy(
        update={"job": job.job.model_copy(update={"labels": tuple("abcdefghij")})}
    )
    rows = read_split(splits_of(job).config.data.train, job).dataset
    with pytest.raises(BackboneError, match="does not know the job's labels"):
        teacher_logits(GLYPHS, rows, other, store=store(tmp_path), device=torch.device("cpu"))


def test_a_site_without_a_teacher_says_so() -> None:
    job = digits_job(*TAUGHT)
    node = dict(make_nodes(job, prepare(job), states="", device="cpu")[0])
    del node["teacher"]
    with pytest.raises(SiteFailure, match="no-teacher"):
        _ = open_participant(node).splits(job).train
    with pytest.raises(JobError, match="needs a teacher"):
        digits_job("training.distillation.weight=0.5")


def with_teacher(kind: str, rows: Any, seed: int = 3) -> Any:
    draw = np.random.default_rng(seed)
    return rows.with_teacher(draw.normal(0, 3, (len(rows), 10)).astype(np.float32))


@pytest.mark.parametrize("kind", ["deep-vit", "bert"])
def test_company_makes_no_difference(kind: str) -> None:
    rows = [with_teacher(kind, one) for one in uneven(kind)]
    wanted = settings(distillation={"weight": 0.7, "temperature": 3}, label_smoothing=0.1, epochs=2)
    Company(open_small(kind), rows, wanted).check()


def test_without_weight_on_labels_they_do_not_matter() -> None:
    stack, rows = open_small("bert"), with_teacher("bert", rows_for("bert", 20))
    wanted = settings(distillation={"weight": 1.0}, epochs=2)
    others = replace(rows, labels=(rows.labels + 1) % 10)
    one, other = (trained(stack, each, wanted).vector for each in (rows, others))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - noisy(stack.bench)).max() > 1e-4


def test_rows_that_are_chosen_or_joined_keep_what_was_taught() -> None:
    one, other = with_teacher("vit", digits(8)), with_teacher("vit", digits(6, 20), seed=4)
    index = np.array([3, 1])
    np.testing.assert_array_equal(one.subset(index).teacher_logits, one.teacher_logits[index])
    joined = concatenate([one, other])
    assert joined.teacher_logits is not None
    np.testing.assert_array_equal(
        joined.teacher_logits, np.concatenate([one.teacher_logits, other.teacher_logits])
    )


@pytest.mark.slow
def test_a_federation_learns_from_an_exported_one(tmp_path: Path) -> None:
    run, _ = run_digits(tmp_path / "runs", "rounds.count=1")
    bench = open_workbench(run.job)
    plan = make_plan(run.job, bench, run.session)
    export_merged(run, bench, plan.exchanged, adapter_of(run), tmp_path / "teacher")
    bench.put()
    taught = (f"simulation.teacher=path:{tmp_path / 'teacher'}", "training.distillation={}")
    student, summary = run_digits(tmp_path / "runs", "rounds.count=1", *taught)
    assert not np.array_equal(adapter_of(student), adapter_of(run))  # the same but for the teacher
    assert summary["rounds"] == 1 and str(tmp_path) not in summary["job_toml"]
