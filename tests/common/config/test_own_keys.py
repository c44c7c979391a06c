"""Keys of ``[data]`` that only one task has: they are spelled out, and name its columns."""

import tomllib
from typing import Any

import pytest

from fedgraft.common.config.data import Data
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.errors import JobError
from fedgraft.common.tasks import TASKS

OWN = {name: task for name, task in TASKS.items() if task.own_keys}
EVERY = {key for task in OWN.values() for key in task.own_keys}


def job_of(name: str, **data: Any) -> Job:
    task = TASKS[name]
    labels = ["O", "B-x", "I-x"] if task.wants_labels else []
    raw = {
        "job": {"name": "t", "task": name, "labels": labels},
        "backbone": {"source": "path:nowhere"},
        "method": {"kind": "lora", "head": "shared" if task.head_trains else "frozen"},
        "data": data,
    }
    return parse_job(raw, where="t")


@pytest.mark.parametrize("name", TASKS)
def test_a_job_spells_out_the_keys_of_its_task_and_of_no_other(name: str) -> None:
    job = job_of(name)
    said = tomllib.loads(dump_job(job))["data"]
    own = {key: value for key, value in said.items() if key in EVERY}
    assert own == dict(TASKS[name].own_keys)
    for text in (job.model_dump_json(), job.for_sites().model_dump_json()):
        assert Job.model_validate_json(text).data.model_extra == own
    assert parse_job(tomllib.loads(dump_job(job)), where="dump") == job
    assert Data().model_extra == {}  # the default section is nobody's


@pytest.mark.parametrize("name", OWN)
def test_a_key_that_is_given_is_kept(name: str) -> None:
    key, value = next(iter(OWN[name].own_keys.items()))
    other: Any = "mine" if isinstance(value, str) else value - 1
    data = job_of(name, **{key: other}).data
    assert data.model_extra == {**OWN[name].own_keys, key: other}


def test_keys_of_a_modality_are_keys_of_its_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = type(TASKS["text-classification"].modality)
    monkeypatch.setattr(text, "keys", {"dialect": "dialect", "channels": 3.0})
    data = job_of("text-classification", dialect="region").data
    assert data.model_extra == {"dialect": "region", "channels": 3.0}
    assert data.column("dialect") == "region"
    assert job_of("text-regression").data.model_extra == {
        **TASKS["text-regression"].keys, "dialect": "dialect", "channels": 3.0,
    }  # fmt: skip
    with pytest.raises(JobError, match=r"unknown key data\.dialect"):
        job_of("image-classification", dialect="region")


def test_a_column_is_the_value_of_its_key_or_its_default() -> None:
    data = Data().with_own_keys({"words": "tokens", "lowest": 0.0})
    assert data.column("words") == "tokens"
    assert Data(text="message").column("text") == "message"
    # No key: the column is called so, also if a section has a method or a number of that name.
    for name in ("depth", "copy", "own_keys", "validation", "group", "lowest"):
        assert data.column(name) == name
