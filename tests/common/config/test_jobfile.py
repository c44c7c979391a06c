"""Reading a job and writing it: the file itself, overrides, and what is dumped."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.job_files import MINIMAL, refused, simulation, write
from support.matrix import tries

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, load_job, parse_job
from fedgraft.common.methods.lora import LoraMethod
from fedgraft.common.toml import read_text

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
@settings(max_examples=tries(60), deadline=None)
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


def test_every_job_file_in_the_repository_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", "/nowhere")
    root = Path(__file__).parents[3]
    jobs = [*root.glob("simulations/**/*.toml"), *root.glob("server/**/templates/*.toml")]
    assert len(jobs) >= 3
    for path in jobs:
        load_job(path)
