"""Single values of a job: what is out of range, and how durations are written."""

import pytest
from support.raw_jobs import Raw, make, refusal


@pytest.mark.parametrize(
    "training", [{"layer_decay": 0}, {"layer_decay": 1.1}, {"unfreeze": -0.1}, {"unfreeze": 1.1}]
)
def test_rates_by_depth_have_bounds(training: Raw) -> None:
    refusal(training=training)


@pytest.mark.parametrize(
    ("section", "key", "bad"),
    [
        ("job", "name", "../escape"),
        ("job", "name", "-rf"),
        ("job", "name", "x" * 65),
        ("job", "task", "poetry"),
        ("job", "seed", -1),
        ("job", "seed", 2**62),
        ("backbone", "source", "hf:"),
        ("backbone", "source", "https://example.org/model"),
        ("backbone", "weights", "pickled"),
        ("method", "rank", 0),
        ("method", "alpha", 0),
        ("method", "dropout", 1.0),
        ("method", "head", "maybe"),
        ("training", "epochs", 0),
        ("training", "batch_size", 0),
        ("training", "learning_rate", 0),
        ("training", "learning_rate", float("inf")),
        ("training", "learning_rate", float("nan")),
        ("training", "weight_decay", -0.1),
        ("training", "clip_norm", -1),
        ("training", "precision", "fp8"),
        ("training", "proximal", -1),
        ("training", "schedule", {"warmup": 1.0}),
        ("training", "schedule", {"floor": 1.1}),
        ("rounds", "count", 0),
        ("rounds", "count", 1.5),
        ("rounds", "cohort", 0),
        ("rounds", "fraction", 0),
        ("rounds", "fraction", 1.1),
        ("rounds", "min_sites", 0),
        ("rounds", "evaluate_every", 0),
        ("rounds", "early_stopping", {"patience": 0}),
        ("aggregation", "rule", "krum"),
        ("aggregation", "weights", "age"),
        ("aggregation", "max_update_norm", 0),
        ("aggregation", "max_examples", 0),
        ("aggregation", "server_optimizer", {"beta1": 1.0}),
        ("data", "validation", 1.0),
        ("data", "max_length", 3),
        ("data", "normalize", "none"),
        ("privacy", "secure_aggregation", {"clip": 0}),
        ("privacy", "secure_aggregation", {"clip": float("inf")}),
        ("privacy", "secure_aggregation", {"max_sites": 2}),
        ("privacy", "secure_aggregation", {"max_sites": 65536}),
        ("privacy", "secure_aggregation", {"max_weight": 0}),
        ("privacy", "secure_aggregation", {"ring_bits": 20}),
        ("privacy", "secure_aggregation", {"value_bits": 1}),
        ("privacy", "secure_aggregation", {"value_bits": 33}),
        ("privacy", "secure_aggregation", {"colluders": -0.1}),
        ("privacy", "secure_aggregation", {"colluders": 0.5}),
        ("privacy", "secure_aggregation", {"colluders": 1}),
        ("privacy", "secure_aggregation", {"dropouts": 0.5}),
        ("privacy", "secure_aggregation", {"max_sites": True}),
        ("privacy", "secure_aggregation", {"value_bits": True}),
        ("privacy", "secure_aggregation", {"mode": "semi-honest"}),
        ("privacy", "epsilon", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused(section: str, key: str, bad: object) -> None:
    assert f"{section}." in refusal(**{section: {key: bad}})


def test_a_classification_has_two_labels_at_least() -> None:
    assert "text-classification needs at least two labels" in refusal(job={"labels": ["only"]})


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("sites", 0),
        ("finetune_epochs", -1),
        ("workers", -1),
        ("device", "tpu"),
        ("baselines", ["oracle"]),
        ("partition", {"alpha": 0}),
        ("partition", {"min_examples": 0}),
    ],
)
def test_a_simulation_value_out_of_range_is_refused(key: str, bad: object) -> None:
    assert "simulation." in refusal(simulation={"train": "x", key: bad})


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("1d", 86400),
        ("1.5 h", 5400),
        (" 2m ", 120),
        (45, 45),
        (0.5, 0.5),
    ],
)
def test_a_duration_is_read_in_its_unit(written: object, seconds: float) -> None:
    assert make(rounds={"deadline": written}).rounds.deadline == seconds


@pytest.mark.parametrize("written", ["soon", "30", "30 min", "-5s", "", "s", "1.2.3s", "..s"])
def test_text_that_is_no_duration_is_refused_with_an_example(written: str) -> None:
    assert 'write a duration as "90s"' in refusal(rounds={"deadline": written})


@pytest.mark.parametrize("written", [0, "0s", -1, float("inf")])
def test_a_round_waits_for_some_finite_time(written: object) -> None:
    assert "rounds.deadline" in refusal(rounds={"deadline": written})


@pytest.mark.parametrize(
    ("section", "key"),
    [("rounds", "count"), ("rounds", "deadline"), ("training", "learning_rate"), ("job", "seed")],
)
def test_true_is_not_the_number_one(section: str, key: str) -> None:
    refusal(**{section: {key: True}})
