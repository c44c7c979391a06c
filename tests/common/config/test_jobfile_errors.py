"""What is wrong with a job file is named by its key, with the way out."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.job_files import MINIMAL, refused, write

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import load_job, parse_job
from fedgraft.common.errors import JobError
from fedgraft.common.methods.partial import PartialMethod


def full_raw(kind: str = "lora") -> dict[str, Any]:
    """A raw job with every section, as plain dicts and lists."""
    raw = tomllib.loads(MINIMAL)
    raw["method"] = {"kind": kind, "head": "shared"}
    raw["rounds"] = {"early_stopping": {}}
    return Job.model_validate(raw).model_dump(mode="json")


def keys_of(raw: dict[str, Any], *path: str) -> Iterator[tuple[str, ...]]:
    for key, value in raw.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, *path, key)


EVERY_KEY = sorted(
    {
        *keys_of(full_raw()),
        *keys_of(full_raw("head")),
        *keys_of(full_raw("partial")),
        ("job", "labels_from"),
    },
    key=".".join,
)


# --- keys


@pytest.mark.parametrize("kind", ["lora", "head", "partial"])
@pytest.mark.parametrize("path", EVERY_KEY, ids=".".join)
def test_a_misspelt_key_is_named_with_the_nearest_one(path: tuple[str, ...], kind: str) -> None:
    raw = full_raw(kind)
    *parents, key = path
    section = raw
    for part in parents:
        section = section[part]
    if key not in section and key != "labels_from":
        pytest.skip("a key of the other method")
    section[f"{key}x"] = 1
    with pytest.raises(JobError) as caught:
        parse_job(raw, where="job.toml")
    assert str(caught.value) == f"job.toml: unknown key {'.'.join([*parents, key])}x"
    assert caught.value.hint == f"did you mean {key}?"


def test_a_key_like_no_other_lists_those_there_are(file: Path) -> None:
    error = refused(file, "simulation.partition.zzzz=1")
    assert "unknown key simulation.partition.zzzz" in str(error)
    assert error.hint == "known: kind, alpha, min_examples"


def test_another_kind_of_method_lets_go_of_the_settings_of_the_old(file: Path) -> None:
    write(file, 'head = "shared"', 'head = "frozen"\nrank = 4')
    job = load_job(file, ("method.blocks=2", "method.kind=partial"))
    assert job.method == PartialMethod(kind="partial", blocks=2, head="frozen")
    assert load_job(file, ("method.kind=lora",)).method.rank == 4  # type: ignore[attr-defined]
    assert "unknown key method.rank" in str(refused(file, "method.kind=partial", "method.rank=2"))


def test_keys_of_the_other_method_are_unknown(file: Path) -> None:
    error = refused(file, "method.kind=head", "method.rank=4")
    assert "unknown key method.rank" in str(error)
    assert error.hint == "known: kind, head"


@pytest.mark.parametrize("key", ["name", "task"])
def test_a_missing_key_is_named_with_its_section(file: Path, key: str) -> None:
    lines = MINIMAL.splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith(f"{key} ")))
    error = refused(file)
    assert str(error) == f"{file}: job.{key} is missing"
    assert error.hint == f"add {key} to [job]"


def test_a_classification_needs_labels_and_a_language_model_has_none(file: Path) -> None:
    error = refused(file, "job.labels=[]")
    assert "text-classification needs at least two labels" in str(error)
    error = refused(file, "job.task=causal-lm", "method.head=frozen")
    assert "causal-lm has no labels" in str(error)
    error = refused(file, "job.task=causal-lm", "job.labels=[]", "method.head=shared")
    assert error.hint == 'method.kind = "lora" with method.head = "frozen"'


def test_every_problem_is_reported_at_once(file: Path) -> None:
    error = refused(file, "rounds.count=0", "rouns.count=1", "method.head=maybe")
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)
    assert "did you mean rounds?" in error.hint
    assert "method.head" in error.hint


def test_an_unknown_method_names_those_there_are(file: Path) -> None:
    error = refused(file, "method.kind=lorra")
    assert "method" in str(error)
    assert error.hint == 'kind = "lora" or kind = "head" or kind = "partial"'


def test_a_method_without_kind_says_which_kinds_there_are(file: Path) -> None:
    error = refused(write(file, 'kind = "lora"\n', ""))
    assert error.hint == 'kind = "lora" or kind = "head" or kind = "partial"'


@pytest.mark.parametrize("text", ["", "job = 3\nbackbone = 'x'\nmethod = [1]\nsimulation = 4\n"])
def test_sections_that_are_missing_or_no_tables_are_each_named(file: Path, text: str) -> None:
    file.write_text(text)
    message = str(refused(file))
    assert all(f"{file}: {section}" in message for section in ("job", "backbone", "method"))


# --- values of the wrong type


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("job.name=2024", "job.name"),
        ("job.labels=yes", "job.labels"),
        ('job.labels=["a", "b", 3]', "job.labels.2"),
        ("job.seed=x", "job.seed"),
        ("backbone.source=[]", "backbone.source"),
        ("method.rank=many", "method.rank"),
        ("method.rank=1.5", "method.rank"),
        ("training.learning_rate=fast", "training.learning_rate"),
        ("rounds.count={}", "rounds.count"),
        ("rounds.deadline=[1]", "rounds.deadline"),
        ("aggregation.server_optimizer.kind=1", "aggregation.server_optimizer.kind"),
        ("data.text=1", "data.text"),
        ("simulation.baselines=central", "simulation.baselines"),
        ("simulation.partition.alpha=low", "simulation.partition.alpha"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_its_key(file: Path, override: str, key: str) -> None:
    error = refused(file, override)
    assert str(error).startswith(f"{file}: {key}: ")
    assert error.hint == f"mend {key}"


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (("method.targets=[]",), 'kind = "head"'),
        (('job.labels=["a", "a"]',), "name each label once"),
        (("rounds.cohort=2", "rounds.fraction=0.5"), "keep one of them"),
        (("rounds.cohort=2", "rounds.min_sites=3"), "rounds.min_sites"),
        (("rounds.cohort=5",), "rounds.cohort = 4"),
        (("rounds.min_sites=5",), "rounds.min_sites"),
        (("aggregation.rule=ffa", "method.kind=head"), 'method.kind = "lora"'),
        (("aggregation.rule=ffa", "method.dora=true"), "method.dora = false"),
        (("rounds.early_stopping.patience=1", "data.validation=0"), "data.validation = 0.1"),
    ],
)
def test_what_contradicts_itself_comes_with_a_way_out(
    file: Path, overrides: tuple[str, ...], hint: str
) -> None:
    assert hint in refused(file, *overrides).hint


def test_the_wrong_value_itself_is_shown(file: Path) -> None:
    assert "(got 'x')" in str(refused(file, "job.seed=x"))


@pytest.mark.parametrize("value", ["3", "all_linear", '["query", 3]'])
def test_wrong_targets_are_explained_in_the_words_of_the_file(file: Path, value: str) -> None:
    error = refused(file, f"method.targets={value}")
    shown = f"{error} {error.hint}"
    assert "method.targets" in shown
    assert "literal[" not in shown
    assert "tuple[" not in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.secure_aggregation", "true"),
        ("training.schedule", "cosine"),
        ("rounds.early_stopping", "true"),
    ],
)
def test_a_value_where_a_section_belongs_is_told_apart(file: Path, key: str, value: str) -> None:
    error = refused(file, f"{key}={value}")
    assert str(error) == f"{file}: {key}: a section, not a value"
    assert f"[{key}]" in error.hint
