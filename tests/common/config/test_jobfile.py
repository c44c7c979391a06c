"""Reading a job: overrides, paths, labels, and errors that name the key and the way out."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, load_job, parse_job
from fedgraft.common.config.simulation import Simulation
from fedgraft.common.errors import JobError
from fedgraft.common.methods import LoraMethod, PartialMethod
from fedgraft.common.toml import read_text

MINIMAL = """\
[job]
name = "tiny"
task = "text-classification"
labels = ["yes", "no"]
[backbone]
source = "builtin:glyph-vit"
[method]
kind = "lora"
head = "shared"
[simulation]
train = "train.jsonl"
sites = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid job file in a folder of its own."""
    path = tmp_path / "jobs" / "job.toml"
    path.parent.mkdir()
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def write(path: Path, old: str, new: str) -> Path:
    """Replace ``old`` in the job file."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> JobError:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return caught.value


def simulation(path: Path, *overrides: str) -> Simulation:
    section = load_job(path, overrides).simulation
    assert section is not None
    return section


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
    assert load_job(file, ("method.kind=lora",)).method.rank == 4  # type: ignore[union-attr]
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


# --- the file itself


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.toml")
    assert "no file" in str(error)
    assert "fedgraft init" in error.hint


def test_a_folder_is_no_job_file(tmp_path: Path) -> None:
    assert "cannot be read" in str(refused(tmp_path))


def test_a_file_that_is_not_utf8_names_the_byte(file: Path) -> None:
    file.write_bytes(b"# caf\xe9\n" + MINIMAL.encode())
    error = refused(file)
    assert "not UTF-8 (byte 5)" in str(error)
    assert "UTF-8" in error.hint


def test_bad_toml_names_the_line(file: Path) -> None:
    error = refused(write(file, "sites = 4", "sites = = 4"))
    assert "not valid TOML" in str(error)
    assert "line 12" in str(error)


def test_a_byte_order_mark_is_no_part_of_a_job_file(file: Path) -> None:
    expected = load_job(file)
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_job(file) == expected


def test_text_is_read_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("größe".encode())
    assert read_text(path) == "größe"


# --- overrides


def test_overrides_are_typed_like_toml(file: Path) -> None:
    overrides = (
        "rounds.count=5",
        "training.learning_rate=1e-4",
        'job.labels=["a", "b", "c"]',
        "training.schedule.shape=linear",
        'job.name="quoted"',
        "simulation.baselines=[]",
    )
    job = load_job(file, overrides)
    assert job.rounds.count == 5
    assert job.training.learning_rate == 1e-4
    assert job.job.labels == ("a", "b", "c")
    assert job.training.schedule.shape == "linear"
    assert job.job.name == "quoted"
    assert job.simulation is not None
    assert job.simulation.baselines == ()


def test_a_value_may_hold_equals_signs_and_spaces(file: Path) -> None:
    assert load_job(file, ("data.text = a = b ",)).data.text == "a = b"


def test_an_override_keeps_the_rest_of_its_section(file: Path) -> None:
    write(file, "sites = 4", 'sites = 4\npartition = { kind = "iid", min_examples = 7 }')
    partition = simulation(file, "simulation.partition.kind=dirichlet").partition
    assert (partition.kind, partition.min_examples) == ("dirichlet", 7)
    inline = simulation(file, 'simulation.partition={kind="natural"}').partition
    assert (inline.kind, inline.min_examples) == ("natural", 7)


def test_the_last_of_equal_overrides_wins(file: Path) -> None:
    assert load_job(file, ("rounds.count=5", "rounds.count=6")).rounds.count == 6


def test_overrides_make_sections_the_file_does_not_have(file: Path) -> None:
    stopping = load_job(file, ("rounds.early_stopping.patience=9",)).rounds.early_stopping
    assert stopping is not None
    assert stopping.patience == 9


@pytest.mark.parametrize(
    "item", ["rounds.count", "count=3", "rounds=3", "=3", ".=3", "rounds.=3", ".count=3", ""]
)
def test_an_override_that_names_no_key_shows_how_to(file: Path, item: str) -> None:
    error = refused(file, item)
    assert f"--set {item!r} is not section.key=value" in str(error)
    assert error.hint == "--set rounds.count=5"


def test_an_override_below_another_overrides_value_is_refused(file: Path) -> None:
    error = refused(file, "rounds.count=1", "rounds.count.x=2")
    assert "count is not a section" in str(error)


# --- paths


def test_paths_in_the_file_start_at_the_file_and_in_overrides_at_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write(file, '"builtin:glyph-vit"', '"path:../models/bert"')
    loaded = load_job(file)
    assert loaded.simulation is not None
    assert loaded.simulation.train == str(file.parent / "train.jsonl")
    assert loaded.backbone.source == f"path:{tmp_path / 'models' / 'bert'}"
    assert loaded.simulation.test is None

    overridden = load_job(
        file,
        ("simulation.train=a.jsonl", "simulation.test=b.jsonl", "backbone.source=path:bert"),
    )
    assert overridden.simulation is not None
    assert overridden.simulation.train == str(elsewhere / "a.jsonl")
    assert overridden.simulation.test == str(elsewhere / "b.jsonl")
    assert overridden.backbone.source == f"path:{elsewhere / 'bert'}"


def test_a_file_named_without_a_folder_is_anchored_all_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert simulation(Path(file.name)).train == str(file.parent / "train.jsonl")


@pytest.mark.parametrize("path", ["/data/x.jsonl", "builtin:digits"])
def test_absolute_and_built_in_data_stay_as_they_are(file: Path, path: str) -> None:
    assert simulation(file, f"simulation.train={path}").train == path


def test_a_backbone_of_the_hub_is_no_path(file: Path) -> None:
    assert load_job(file, ("backbone.source=hf:a/b@c",)).backbone.source == "hf:a/b@c"


@pytest.mark.parametrize("form", ["$FEDGRAFT_T", "${FEDGRAFT_T}"])
def test_environment_variables_in_paths_are_filled_in(
    file: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("FEDGRAFT_T", "/mnt/data")
    assert simulation(file, f"simulation.train={form}/x.jsonl").train == "/mnt/data/x.jsonl"
    assert simulation(write(file, "train.jsonl", f"{form}/y")).train == "/mnt/data/y"


@pytest.mark.parametrize("form", ["$FEDGRAFT_T", "${FEDGRAFT_T}"])
@pytest.mark.parametrize("key", ["simulation.train", "simulation.test", "backbone.source"])
def test_an_environment_variable_that_is_not_set_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, key: str, form: str
) -> None:
    monkeypatch.delenv("FEDGRAFT_T", raising=False)
    prefix = "path:" if key == "backbone.source" else ""
    error = refused(file, f"{key}={prefix}{form}/x")
    assert f"{key} = " in str(error)
    assert "FEDGRAFT_T is not set" in str(error)
    assert error.hint.startswith("export FEDGRAFT_T=")


def test_a_dollar_sign_inside_a_variables_value_is_taken_literally(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGRAFT_T", "/mnt/cash$pot")
    assert simulation(file, "simulation.train=${FEDGRAFT_T}/x").train == "/mnt/cash$pot/x"


def test_a_tilde_is_the_home_folder(file: Path) -> None:
    assert simulation(file, "simulation.train=~/x").train == os.path.expanduser("~/x")


def test_a_path_backbone_without_a_path_is_refused(file: Path) -> None:
    assert "backbone.source" in str(refused(file, "backbone.source=path:"))


# --- labels_from


def test_labels_come_from_a_file_beside_the_job(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "labels.txt"')
    (file.parent / "labels.txt").write_bytes("größe\n\n  card lost \r\nno".encode())
    assert load_job(file).job.labels == ("größe", "card lost", "no")


def test_a_byte_order_mark_is_no_part_of_the_first_label(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "labels.txt"')
    (file.parent / "labels.txt").write_bytes(b"\xef\xbb\xbfyes\nno\n")
    assert load_job(file).job.labels == ("yes", "no")


def test_labels_and_labels_from_together_are_refused(file: Path) -> None:
    error = refused(write(file, "labels =", 'labels_from = "labels.txt"\nlabels ='))
    assert "both labels and labels_from" in str(error)


def test_a_labels_file_that_is_missing_or_no_path_is_refused(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "none.txt"')
    assert str(file.parent / "none.txt") in str(refused(file))
    assert "not a path" in str(refused(write(file, '"none.txt"', "3")))


def test_labels_of_the_file_are_checked_like_any(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "labels.txt"')
    (file.parent / "labels.txt").write_text("yes\nyes\n")
    assert "labels named twice: yes" in str(refused(file))


# --- dump

words = st.text(min_size=1, max_size=12)
rates = st.floats(1e-30, 1e6)
shares = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10**9)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Any valid job."""
    lora = st.fixed_dictionaries(
        {"kind": st.just("lora"), "head": st.sampled_from(["shared", "local", "frozen"])},
        optional={
            "rank": st.integers(1, 1024),
            "alpha": rates,
            "dropout": shares,
            "targets": st.sampled_from(["all-linear", "all-conv"])
            | st.lists(words, min_size=1, max_size=3),
        },
    )
    method = draw(lora | st.just({"kind": "head"}))
    accumulation = draw(st.integers(1, 4))
    sites = draw(st.none() | st.integers(4, 1000))
    simulated = st.fixed_dictionaries(
        {"train": words, "sites": st.just(sites)},
        optional={
            "test": words,
            "shift": st.sampled_from(["none", "image"]),
            "baselines": st.lists(st.sampled_from(["zero_shot", "central"]), unique=True),
            "central": st.fixed_dictionaries({}, optional={"learning_rate": rates}),
            "workers": st.integers(0, 64),
        },
    )
    stopping = st.none() | st.just({"metric": "accuracy"})
    how_many: tuple[dict[str, st.SearchStrategy[Any]], ...] = (
        {"cohort": st.integers(1, 4)},
        {"fraction": st.floats(0.01, 1)},
        {},
    )
    raw = {
        "job": {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)),
            "task": draw(st.sampled_from(["text-classification", "image-classification"])),
            "labels": draw(st.lists(st.text(max_size=9), min_size=2, max_size=5, unique=True)),
            "seed": draw(st.integers(0, 2**62 - 1)),
        },
        "backbone": {"source": "path:" + draw(st.from_regex(r"[^\n]+", fullmatch=True))},
        "method": method,
        "training": {
            "batch_size": accumulation * draw(st.integers(1, 64)),
            "accumulation": accumulation,
            "learning_rate": draw(rates),
            "clip_norm": draw(rates),
            "schedule": {"floor": draw(st.floats(0, 1))},
        },
        "rounds": {
            **draw(st.sampled_from(how_many).flatmap(st.fixed_dictionaries)),
            "deadline": draw(rates),
            "early_stopping": None if method.get("head") == "local" else draw(stopping),
        },
        "aggregation": {"max_examples": draw(counts)},
        "data": {"text": draw(words), "validation": draw(st.floats(0.01, 0.9))},
        "simulation": draw(st.none() | simulated),
    }
    return Job.model_validate(raw)


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_a_dumped_job_reads_back_equal(job: Job) -> None:
    assert parse_job(tomllib.loads(dump_job(job)), where="dump") == job


def test_a_job_that_clips_nothing_survives_a_dump() -> None:
    raw = tomllib.loads(MINIMAL)
    try:
        job = Job.model_validate(raw | {"training": {"clip_norm": None}})
    except ValueError:
        return  # a job that cannot say so cannot lose it
    assert parse_job(tomllib.loads(dump_job(job)), where="dump") == job


def test_a_dump_spells_out_every_default(file: Path) -> None:
    dumped = tomllib.loads(dump_job(load_job(file)))
    assert dumped["training"]["learning_rate"] == 1e-3
    assert dumped["rounds"]["deadline"] == 1800
    assert dumped["simulation"]["partition"]["kind"] == "dirichlet"


def test_a_dump_loads_from_any_folder_to_the_same_job(file: Path, tmp_path: Path) -> None:
    write(file, '"builtin:glyph-vit"', '"path:bert"')
    job = load_job(file)
    copied = tmp_path / "copy.toml"
    copied.write_text(dump_job(job), encoding="utf-8")
    assert load_job(copied) == job
    assert isinstance(job.method, LoraMethod)


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
