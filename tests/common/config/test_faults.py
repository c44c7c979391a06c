"""The section ``[simulation.faults]``: what it takes, and what it refuses."""

import tomllib
from typing import Any

import pytest

from fedgraft.common.config.faults import Faults
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.errors import JobError


def make_job(masked: bool = False, **faults: Any) -> Job:
    raw = {
        "job": {"name": "t", "task": "text-classification", "labels": ["yes", "no"]},
        "backbone": {"source": "builtin:none"},
        "method": {"kind": "head"},
        "privacy": {"secure_aggregation": {"enabled": masked}},
        "simulation": {"train": "t", "sites": 5, "faults": faults},
    }
    return parse_job(raw, where="test")


def faults_of(job: Job) -> Faults:
    assert job.simulation is not None
    return job.simulation.faults


def test_all_faults_are_off_unless_asked_for() -> None:
    faults = faults_of(make_job())
    assert not (faults.any or faults.poisons_labels or faults.poisons_updates)
    assert not faults_of(make_job(delay="1h", poison="nan")).any  # of no site


@pytest.mark.parametrize("one", [{"dropout": 0.1}, {"stragglers": 1}, {"poisoned": 0.5}])
def test_one_fault_is_a_fault(one: dict[str, Any]) -> None:
    assert faults_of(make_job(**one)).any


def test_a_delay_is_a_duration_and_a_bare_nan_is_a_word() -> None:
    faults = faults_of(make_job(stragglers=0.2, delay="10m", poisoned=0.2, poison=float("nan")))
    assert (faults.delay, faults.poison) == (600.0, "nan")
    assert faults.poisons_updates and not faults.poisons_labels


def test_what_is_written_to_a_run_is_what_is_read() -> None:
    job = make_job(dropout=0.1, stragglers=0.2, delay="90s", poisoned=0.3, poison="noise")
    assert parse_job(tomllib.loads(dump_job(job)), where="run") == job


def test_sites_are_not_told() -> None:
    assert "faults" not in make_job(dropout=0.1).for_sites().model_dump_json()


@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout": 1.0},  # no round could ever succeed
        {"dropout": -0.1},
        {"stragglers": 1.1},
        {"poisoned": 2},
        {"delay": 0},
        {"delay": "soon"},
        {"poison": "hemlock"},
        {"drop": 0.1},
    ],
)
def test_a_wrong_value_is_refused_with_a_hint(wrong: dict[str, Any]) -> None:
    with pytest.raises(JobError) as refused:
        make_job(**wrong)
    assert next(iter(wrong)) in str(refused.value) and refused.value.hint


@pytest.mark.parametrize("poison", ["sign-flip", "noise", "nan"])
def test_masked_updates_cannot_be_poisoned(poison: str) -> None:
    with pytest.raises(JobError, match="masks cannot be altered") as refused:
        make_job(masked=True, poisoned=0.2, poison=poison)
    assert 'poison = "labels"' in refused.value.hint
    make_job(masked=True, poisoned=0.0, poison=poison)
    make_job(masked=False, poisoned=0.2, poison=poison)


def test_all_other_faults_can_be_played_under_masks() -> None:
    make_job(masked=True, dropout=0.1, stragglers=0.2, poisoned=0.2, poison="labels")
