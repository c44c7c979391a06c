"""The server optimiser of a job that names only its kind takes no step that could ruin a run."""

import tomllib
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.raw_jobs import Raw, make, refusal

from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.config.sections import TOO_FAR, ServerOptimizer
from fedgraft.server.cli.jobs import _warnings
from fedgraft.server.optimizers import apply
from fedgraft.server.state import Moments

NAMED: list[tuple[Raw, tuple[float, float, float]]] = [
    ({"kind": "none"}, (1.0, 0.9, 1e-3)),
    ({"kind": "momentum"}, (0.5, 0.5, 1e-3)),
    ({"kind": "momentum", "beta1": 0.75}, (0.25, 0.75, 1e-3)),
    ({"kind": "momentum", "beta1": 0}, (1.0, 0.0, 1e-3)),
    ({"kind": "adam"}, (0.03, 0.5, 0.01)),
    ({"kind": "yogi"}, (0.03, 0.5, 0.01)),
    ({"kind": "adam", "tau": 0.1, "beta1": 0.9}, (0.3, 0.9, 0.1)),
    ({"kind": "reptile"}, (2.0, 0.9, 1e-3)),
]


def optimizer(settings: Raw) -> ServerOptimizer:
    return make(aggregation={"server_optimizer": settings}).aggregation.server_optimizer


def values(settings: Raw) -> tuple[float, float, float]:
    found = optimizer(settings)
    return found.learning_rate, found.beta1, found.tau


@pytest.mark.parametrize(("settings", "wanted"), NAMED, ids=str)
def test_a_rate_that_is_not_named_follows_from_the_kind(
    settings: Raw, wanted: tuple[float, float, float]
) -> None:
    assert values(settings) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["none", "momentum", "adam", "yogi", "reptile"])
@pytest.mark.parametrize("rate", [1, 1.0, 0.01])
def test_a_rate_that_is_named_keeps_the_meaning_it_had(kind: str, rate: float) -> None:
    assert values({"kind": kind, "learning_rate": rate}) == (rate, 0.9, 1e-3)


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi", "reptile"])
def test_a_job_is_the_same_after_it_has_travelled(kind: str) -> None:
    job = make(aggregation={"server_optimizer": {"kind": kind}})
    assert parse_job(tomllib.loads(dump_job(job)), where="test") == job
    assert type(job).model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(
    ("kind", "most"),
    [("none", 1.0), ("momentum", 1.0), ("adam", 3.0), ("yogi", 3.0), ("reptile", 2)],
)
def test_no_kind_moves_much_further_than_the_sites_do(kind: Any, most: float, size: float) -> None:
    settings = ServerOptimizer(kind=kind)
    draw = np.random.default_rng(5)
    x, moments, gone = np.zeros(50, np.float32), Moments(), np.zeros(50)
    for number in range(30):
        step = size * draw.normal(0.5, 1, 50)
        x, moments = apply(settings, x, step, moments, done=number / 30)
        gone += np.abs(step)
        assert (np.abs(x) <= most * gone * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [{"beta1": 1.0}, {"beta1": True}, {"tau": 0}, {"tau": "small"}])
@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_wrong_values_are_refused_as_before(kind: str, bad: Raw) -> None:
    refusal(aggregation={"server_optimizer": {"kind": kind, **bad}})


@pytest.mark.parametrize(
    "raw", [{"kind": []}, {"kind": "adam", "tau": []}, {"kind": "adam", "tau": -1}]
)
def test_a_wrong_value_is_refused_and_no_fault(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServerOptimizer.model_validate(raw)


def test_a_number_in_quotes_keeps_the_safe_rate() -> None:
    assert ServerOptimizer.model_validate({"kind": "momentum", "beta1": "0.5"}).learning_rate == 0.5
    assert ServerOptimizer.model_validate({"kind": "adam", "tau": "0.1"}).learning_rate < 1


@pytest.mark.parametrize(
    ("settings", "reach"),
    [
        ({"kind": "none"}, 1),
        ({"kind": "momentum"}, 1),
        ({"kind": "adam"}, 3),
        ({"kind": "reptile"}, 2),
        ({"kind": "momentum", "learning_rate": 1.0}, 10),
        ({"kind": "adam", "learning_rate": 0.1}, 100),
        ({"kind": "yogi", "learning_rate": 1.0}, 1000),
        ({"kind": "none", "learning_rate": 30}, 30),
    ],
)
def test_how_far_a_server_may_move_is_known_and_pointed_out(settings: Raw, reach: float) -> None:
    job = make(aggregation={"server_optimizer": settings})
    assert job.aggregation.server_optimizer.reach == pytest.approx(reach)
    told = _warnings(job)
    assert len(told) == (reach > TOO_FAR)
    assert all(f"{reach:,} times as far" in text for text in told)
