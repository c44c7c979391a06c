"""A job that exists is consistent and frozen: what does not validate, and what defaults mean."""

from typing import Any

import pytest
from pydantic import ValidationError
from support.raw_jobs import Raw, explained, make, masked, raw_job, refusal

from fedgraft.common.aggregation import RULES
from fedgraft.common.config.job import Job
from fedgraft.common.methods.lora import LoraMethod

# --- pairs that contradict each other


INDIVIDUAL = [name for name, rule in RULES.items() if rule.needs == "individual"]


def test_more_sites_a_round_than_there_are_is_refused() -> None:
    simulation = {"train": "x", "sites": 4}
    assert "cohort = 5 is larger than the 4 sites" in refusal(
        rounds={"cohort": 5}, simulation=simulation
    )
    assert make(rounds={"cohort": 4}, simulation=simulation).rounds.cohort == 4


@pytest.mark.parametrize(
    ("rounds", "sites"),
    [
        ({"min_sites": 5}, 4),
        ({"min_sites": 3, "fraction": 0.5}, 4),
        ({"min_sites": 2, "fraction": 0.01}, 100),
    ],
)
def test_min_sites_that_the_sites_can_never_reach_is_refused(rounds: Raw, sites: int) -> None:
    simulation = {"train": "x", "sites": sites}
    assert "can never be reached" in refusal(rounds=rounds, simulation=simulation)
    reachable = rounds | {"min_sites": rounds["min_sites"] - 1}
    assert make(rounds=reachable, simulation=simulation)


def test_min_sites_above_the_cohort_is_refused_also_without_a_simulation() -> None:
    assert "min_sites = 4 can never be reached with cohort = 3" in refusal(
        rounds={"cohort": 3, "min_sites": 4}
    )
    assert make(rounds={"cohort": 3, "min_sites": 3})


def test_the_number_of_natural_sites_is_not_guessed() -> None:
    simulation = {"train": "x/*", "partition": {"kind": "natural"}}
    assert make(rounds={"cohort": 50, "min_sites": 50}, simulation=simulation)


def test_cohort_and_fraction_exclude_each_other() -> None:
    assert "both cohort and fraction" in refusal(rounds={"cohort": 3, "fraction": 0.5})


def test_ffa_needs_low_rank_factors() -> None:
    head_only = {"method": {"kind": "head", "head": "shared"}}
    assert "ffa" in refusal(aggregation={"rule": "ffa"}, **head_only)
    assert make(aggregation={"rule": "fedavg"}, **head_only)
    assert make(aggregation={"rule": "ffa"})


def test_early_stopping_needs_validation_examples() -> None:
    rounds: Raw = {"early_stopping": {}}
    assert "data.validation" in refusal(rounds=rounds, data={"validation": 0})
    assert make(rounds=rounds, data={"validation": 0.1})
    assert make(data={"validation": 0})


def test_labels_named_twice_are_refused_by_name() -> None:
    assert "labels named twice: a, b" in refusal(job={"labels": ["b", "a", "c", "b", "a"]})


def test_a_step_is_a_whole_number_of_micro_batches() -> None:
    assert "multiple of accumulation" in refusal(training={"batch_size": 10, "accumulation": 4})
    assert make(training={"batch_size": 12, "accumulation": 4})


def test_lora_without_targets_is_refused() -> None:
    assert "targets is empty" in refusal(method={"targets": []})


def test_the_head_policy_of_lora_is_never_left_implicit() -> None:
    raw = raw_job()
    del raw["method"]["head"]
    with pytest.raises(ValidationError, match=r"method\.lora\.head"):
        Job.model_validate(raw)


@pytest.mark.parametrize("policy", ["local", "frozen"])
def test_a_head_that_does_not_travel_leaves_the_head_method_nothing(policy: str) -> None:
    refusal(method={"kind": "head", "head": policy})


def test_partial_says_what_of_the_backbone_trains() -> None:
    partial: Raw = {"kind": "partial", "head": "shared"}
    raw = raw_job() | {"method": partial}
    assert Job.model_validate(raw).method.blocks == 1  # type: ignore[attr-defined]
    for change in ({"blocks": 0}, {"blocks": -1}, {"rank": 4}, {"head": None}):
        with pytest.raises(ValidationError):
            Job.model_validate(raw | {"method": partial | change})
    assert Job.model_validate(raw | {"method": {**partial, "blocks": 0, "biases": True}})
    with pytest.raises(ValidationError, match="has none"):
        Job.model_validate(raw | {"aggregation": {"rule": "ffa"}, "method": partial})


# --- secure aggregation


def test_secure_aggregation_is_off_unless_it_is_asked_for() -> None:
    assert make().privacy.secure_aggregation.enabled is False
    assert make(privacy=masked()).privacy.secure_aggregation.enabled is True


def test_the_median_is_a_rule_of_its_own() -> None:
    assert make(aggregation={"rule": "median"}).aggregation.rule in INDIVIDUAL


@pytest.mark.parametrize("rule", sorted(INDIVIDUAL))
def test_a_rule_that_sees_each_update_is_refused_where_nobody_may(rule: str) -> None:
    error = explained(aggregation={"rule": rule}, privacy=masked())
    assert f'rule "{rule}" must see each site\'s own update' in str(error)
    assert '"fedavg"' in error.hint and '"ffa"' in error.hint
    assert rule not in error.hint
    assert "privacy.secure_aggregation.enabled = false" in error.hint
    assert make(aggregation={"rule": rule}, privacy={"secure_aggregation": {}})


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_a_rule_that_needs_only_sums_works_masked(rule: str, weights: str) -> None:
    assert make(aggregation={"rule": rule, "weights": weights}, privacy=masked())


@pytest.mark.parametrize(
    "few",
    [
        {"rounds": {"cohort": 2}},
        {"rounds": {"cohort": 1}},
        {"simulation": {"train": "x", "sites": 2}},
        {"rounds": {"cohort": 2}, "simulation": {"train": "x", "sites": 9}},
        {"rounds": {"fraction": 0.2}, "simulation": {"train": "x", "sites": 10}},
    ],
)
def test_a_sum_over_fewer_than_three_sites_protects_nobody(few: dict[str, Raw]) -> None:
    error = explained(privacy=masked(), **few)
    assert "protects nobody" in str(error)
    assert "at least 3 sites" in error.hint
    assert make(**few)


def test_three_sites_are_enough_to_hide_among() -> None:
    assert make(privacy=masked(), rounds={"cohort": 3})
    assert make(privacy=masked(), simulation={"train": "x", "sites": 3})


@pytest.mark.parametrize(
    "many",
    [
        {"rounds": {"cohort": 11}},
        {"simulation": {"train": "x", "sites": 11}},
        {"rounds": {"fraction": 0.11}, "simulation": {"train": "x", "sites": 100}},
    ],
)
def test_a_cohort_that_could_overflow_the_sum_is_refused(many: dict[str, Raw]) -> None:
    error = explained(privacy=masked(max_sites=10), **many)
    assert "a round of 11 sites is larger than max_sites = 10" in str(error)
    assert "privacy.secure_aggregation.max_sites = 11" in error.hint
    assert make(privacy=masked(max_sites=11), **many)


def test_early_stopping_has_every_site_evaluate_and_so_every_site_counts() -> None:
    simulation = {"train": "x", "sites": 20}
    rounds: Raw = {"cohort": 5}
    assert make(privacy=masked(max_sites=10), rounds=rounds, simulation=simulation)
    rounds |= {"early_stopping": {}}
    error = explained(privacy=masked(max_sites=10), rounds=rounds, simulation=simulation)
    assert "20 sites is larger than max_sites = 10" in str(error)
    assert "privacy.secure_aggregation.max_sites = 20" in error.hint
    assert make(privacy=masked(max_sites=20), rounds=rounds, simulation=simulation)


def test_natural_sites_are_checked_once_they_are_known() -> None:
    job = make(privacy=masked(max_sites=10), rounds={"early_stopping": {}})
    job.check_sites(10)
    for sites, why in ((11, "larger than max_sites"), (2, "protects nobody")):
        with pytest.raises(ValueError, match=why):
            job.check_sites(sites)


# --- what a job means


@pytest.mark.parametrize(
    ("rounds", "present", "asked"),
    [
        ({}, 7, 7),
        ({"cohort": 3}, 7, 3),
        ({"cohort": 9}, 7, 7),
        ({"fraction": 0.5}, 8, 4),
        ({"fraction": 0.01}, 8, 1),
        ({"fraction": 1.0}, 8, 8),
    ],
)
def test_cohort_size(rounds: Raw, present: int, asked: int) -> None:
    assert make(rounds=rounds).rounds.cohort_size(present) == asked


def test_sites_get_the_job_without_the_simulation_and_its_paths() -> None:
    job = make(simulation={"train": "/secret/train.jsonl", "sites": 3})
    sent = job.for_sites()
    assert sent.simulation is None
    assert "secret" not in sent.model_dump_json()
    assert sent == make()
    assert job.simulation is not None
    assert Job.model_validate_json(sent.model_dump_json()) == sent


def test_a_job_and_its_sections_are_frozen() -> None:
    job = make(rounds={"early_stopping": {}}, simulation={"train": "x"})
    assert job.simulation is not None
    parts: tuple[Any, ...] = (
        job,
        job.job,
        job.backbone,
        job.method,
        job.training,
        job.training.schedule,
    )
    parts += (job.rounds, job.rounds.early_stopping, job.aggregation, job.data)
    parts += (job.aggregation.server_optimizer, job.simulation, job.simulation.partition)
    for part in parts:
        name = next(iter(type(part).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, getattr(part, name))


def test_lists_become_tuples_so_that_nothing_in_a_job_can_change() -> None:
    job = make(method={"targets": ["query"]}, simulation={"train": "x", "baselines": []})
    assert isinstance(job.method, LoraMethod)
    assert job.simulation is not None
    assert job.job.labels == ("yes", "no")
    assert job.method.targets == ("query",)
    assert job.simulation.baselines == ()


def test_early_stopping_with_local_heads_is_refused() -> None:
    """It may go back to an earlier adapter; the heads at the sites would not go with it."""
    raw = {
        "job": {"name": "j", "task": "text-classification", "labels": ["a", "b"]},
        "backbone": {"source": "path:x"},
        "method": {"kind": "lora", "head": "local"},
        "rounds": {"early_stopping": {}},
    }
    with pytest.raises(ValueError, match="local heads do not go back"):
        Job.model_validate(raw)
