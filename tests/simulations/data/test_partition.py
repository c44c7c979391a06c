"""Simulated sites: every row goes to one site, the same job gives the same sites, and they read
like a real one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.matrix import tries

from fedgraft.client.data.rows import read_split
from fedgraft.client.site_config import load_site
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.config.sections import Rounds
from fedgraft.common.config.simulation import Partition
from fedgraft.common.errors import JobError
from fedgraft.simulations.data import partition as partition_module
from fedgraft.simulations.data.partition import SimulatedSite, partition

LABELS = ["a", "b", "c"]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Placed(SimulatedSite):
    """A site and where it lies."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "site.toml"


def prepare_sites(job: Job, cache: Path) -> list[Placed]:
    prepared = partition_module.prepare_sites(job, cache)
    return [Placed(**vars(site), folder=prepared.folder / site.name) for site in prepared.sites]


def make_job(labels: list[str] = LABELS, *, task: str = "text", seed: int = 0, **sim: Any) -> Job:
    raw = {
        "job": {
            "name": "test",
            "task": f"{task}-classification",
            "labels": labels,
            "seed": seed,
        },
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "head"},
        "data": {"text": "question", "label": "intent"},
        "simulation": sim,
    }
    return parse_job(raw, where="test")


def write_rows(path: Path, count: int, *, first: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"text {n}", "intent": LABELS[n % 3]} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_images(folder: Path, count: int) -> str:
    for n in range(count):
        path = folder / LABELS[n % 3] / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), n).save(path)
    return str(folder)


def texts_of(job: Job, sites: list[Placed], split: str) -> list[list[str]]:
    return [
        read_split(getattr(load_site(site.config).data, split), job).dataset[:]["text"]
        for site in sites
    ]


# Dealing


@settings(max_examples=tries(60), deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    tests=st.booleans(),
    kind=st.sampled_from(["dirichlet", "iid"]),
    alpha=st.sampled_from([0.3, 1.0, 100.0]),
    sites=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_every_row_goes_to_one_site(
    counts: list[int], tests: bool, kind: Any, alpha: float, sites: int, seed: int
) -> None:
    labels: Labels = np.repeat(np.arange(len(counts)), counts)
    test_labels = labels[::2] if tests else None
    how = Partition(kind=kind, alpha=alpha, min_examples=1)

    def deal() -> list[tuple[list[int], list[int]]]:
        generator = np.random.default_rng(seed)
        shares = partition(labels, test_labels, how, sites=sites, generator=generator)
        return [(share.train.tolist(), share.test.tolist()) for share in shares]

    try:
        shares = deal()
    except JobError:
        assume(False)
    assert shares == deal()
    train = [row for mine, _ in shares for row in mine]
    test = [row for _, mine in shares for row in mine]
    if test_labels is None:
        assert sorted(train + test) == list(range(len(labels)))
    else:
        assert sorted(train) == list(range(len(labels)))
        assert sorted(test) == list(range(len(test_labels)))
        assert all(mine for _, mine in shares)
    assert all(mine for mine, _ in shares)
    if kind == "iid":
        sizes = [len(a) + (0 if tests else len(b)) for a, b in shares]
        assert max(sizes) - min(sizes) <= 1


def test_test_sets_follow_their_train_sets() -> None:
    labels: Labels = np.repeat(np.arange(4), 1000)
    how = Partition(kind="dirichlet", alpha=0.3)
    shares = partition(labels, labels, how, sites=5, generator=np.random.default_rng(1))
    for share in shares:
        train, test = (np.bincount(labels[rows], minlength=4) for rows in (share.train, share.test))
        assert train.tolist() == test.tolist()
    assert np.ptp([len(share.train) for share in shares]) > 100


def test_small_alpha_skews_and_large_alpha_evens() -> None:
    labels: Labels = np.repeat(np.arange(10), 200)

    def largest_class(alpha: float) -> float:
        how = Partition(kind="dirichlet", alpha=alpha)
        shares = partition(labels, None, how, sites=5, generator=np.random.default_rng(0))
        return float(np.mean([np.bincount(labels[s.train]).max() / len(s.train) for s in shares]))

    assert largest_class(0.1) > 0.3
    assert largest_class(1000.0) < 0.15


def test_a_split_that_cannot_be_is_a_job_error() -> None:
    labels: Labels = np.zeros(10, dtype=np.int64)
    how = Partition(kind="dirichlet", min_examples=4)
    with pytest.raises(JobError, match="10 train rows cannot be dealt to 5 sites") as caught:
        partition(labels, None, how, sites=5, generator=np.random.default_rng(0))
    assert "alpha" in caught.value.hint and "min_examples" in caught.value.hint


# Folders


def test_a_site_reads_like_a_real_one(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", 90)
    test = write_rows(tmp_path / "test.jsonl", 30, first=90)
    job = make_job(sites=3, train=train, test=test)
    sites = prepare_sites(job, tmp_path / "cache")
    assert [site.name for site in sites] == ["site-00", "site-01", "site-02"]
    for site in sites:
        config = load_site(site.config)
        assert (config.name, config.data.columns) == (site.name, {})
        assert config.data.train == str(site.folder / "train.parquet")
        rows = read_split(config.data.train, job).dataset
        assert len(rows) == site.examples == sum(site.classes)
        assert np.bincount(rows[:]["label"], minlength=3).tolist() == list(site.classes)
        texts = zip(rows[:]["text"], rows[:]["label"], strict=True)
        assert all(int(text.split()[1]) % 3 == label for text, label in texts)
        assert site.shift == "none"
    assert sum(map(len, texts_of(job, sites, "train"))) == 90
    assert {len(set(map(str, part))) for part in texts_of(job, sites, "test")} == {
        site.test_examples for site in sites
    }


def test_labels_that_are_digits_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"question": "x{n}", "intent": {n % 2}}}\n' for n in range(20)))
    job = make_job(["1", "0"], sites=1, train=str(path), partition={"kind": "iid"})
    (site,) = prepare_sites(job, tmp_path / "cache")
    rows = read_split(load_site(site.config).data.train, job).dataset[:]
    for text, label in zip(rows["text"], rows["label"], strict=True):
        assert label == (int(text[1:]) % 2 == 0)


def test_without_a_test_set_a_fifth_is_held_out(tmp_path: Path) -> None:
    job = make_job(sites=2, train=write_rows(tmp_path / "train.jsonl", 60))
    sites = prepare_sites(job, tmp_path / "cache")
    for site in sites:
        assert site.test_examples == round((site.examples + site.test_examples) / 5)
    both = [*texts_of(job, sites, "train"), *texts_of(job, sites, "test")]
    assert len({text for part in both for text in part}) == 60


def test_the_folder_is_reused_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, cache = write_rows(tmp_path / "train.jsonl", 60), tmp_path / "cache"
    sites = prepare_sites(make_job(sites=2, train=train), cache)
    prepare_sites(make_job(sites=2, train=train, seed=1), cache)
    prepare_sites(make_job(sites=3, train=train), cache)
    prepare_sites(make_job(["b", "a", "c"], sites=2, train=train), cache)
    assert len(list(cache.iterdir())) == 4
    moved = write_rows(tmp_path / "elsewhere" / "train.jsonl", 60)
    monkeypatch.setattr(partition_module, "load_pool", _must_not_run)
    assert prepare_sites(make_job(sites=2, train=moved), cache) == sites
    monkeypatch.undo()
    write_rows(tmp_path / "train.jsonl", 61)
    assert prepare_sites(make_job(sites=2, train=train), cache) != sites


def _must_not_run(*args: object) -> None:
    raise AssertionError("made again")


def test_a_killed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(sites=2, train=write_rows(tmp_path / "train.jsonl", 60))
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(partition_module, "dump_site", _must_not_run)
        prepare_sites(job, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepare_sites(job, tmp_path / "cache")) == 2


def test_another_process_may_have_been_faster(tmp_path: Path) -> None:
    job = make_job(sites=2, train=write_rows(tmp_path / "train.jsonl", 60))
    sites = prepare_sites(job, tmp_path / "cache")
    partial = tmp_path / "cache" / ".sites-x"
    partial.mkdir()
    partition_module._publish(partial, sites[0].folder.parent)
    assert prepare_sites(job, tmp_path / "cache") == sites


# Natural sites


def test_natural_sites_are_named_after_what_differs(tmp_path: Path) -> None:
    for name, count in (("north", 30), ("St. Mary", 15)):
        write_rows(tmp_path / name / "train.jsonl", count)
        write_rows(tmp_path / name / "test.jsonl", 6)
    job = make_job(
        train=str(tmp_path / "*" / "train.jsonl"),
        test=str(tmp_path / "*" / "test.jsonl"),
        partition={"kind": "natural"},
    )
    sites = prepare_sites(job, tmp_path / "cache")
    told = [(site.name, site.examples, site.test_examples) for site in sites]
    assert told == [("St.-Mary", 15, 6), ("north", 30, 6)]
    assert [len(part) for part in texts_of(job, sites, "train")] == [15, 30]


def test_natural_image_folders_without_test_sets(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_images(tmp_path / name / "train", 15)
    pattern = str(tmp_path / "*" / "train")
    job = make_job(task="image", train=pattern, partition={"kind": "natural"})
    sites = prepare_sites(job, tmp_path / "cache")
    told = [(site.name, site.examples, site.test_examples) for site in sites]
    assert told == [("x", 12, 3), ("y", 12, 3)]


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"train": "{tmp}/a/train.jsonl"}, "does not say where the sites' names are", "one *"),
        ({"test": "{tmp}/?/test.jsonl"}, "no test data for site b", "found for: a"),
        ({"sites": 3}, "matches 2 sites, simulation.sites says 3", "leave simulation.sites out"),
        ({"train": "{tmp}/*/nothing.csv"}, "nothing matches", "check the pattern"),
        (
            {"partition": {"kind": "natural", "min_examples": 15}},
            "leaves site a 12 examples",
            "min_examples",
        ),
        ({"train": "{tmp}/[ab]/train.jsonl"}, "no site name of its own", "put the *"),
    ],
)
def test_natural_mistakes_are_named(
    tmp_path: Path, change: dict[str, Any], message: str, hint: str
) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name / "train.jsonl", 15)
    write_rows(tmp_path / "a" / "test.jsonl", 15)
    plain: dict[str, Any] = {
        "train": "{tmp}/*/train.jsonl",
        "partition": {"kind": "natural"},
    } | change
    filled: dict[str, Any] = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in plain.items()
    }
    with pytest.raises(JobError) as caught:
        prepare_sites(make_job(**filled), tmp_path / "cache")
    assert message in str(caught.value)
    assert hint in caught.value.hint


# Images and shifts


def test_each_site_has_its_own_camera(tmp_path: Path) -> None:
    train = write_images(tmp_path / "train", 60)
    plain = make_job(task="image", sites=3, train=train)
    shifted = make_job(task="image", sites=3, train=train, shift="image")
    before, after = (prepare_sites(job, tmp_path / "cache") for job in (plain, shifted))
    assert [site.classes for site in before] == [site.classes for site in after]
    assert len({site.shift for site in after}) == 3
    again = prepare_sites(shifted, tmp_path / "other")
    for site, same in zip(after, again, strict=True):
        images = read_split(load_site(site.config).data.train, shifted).dataset[:]["image"]
        twins = read_split(load_site(same.config).data.train, shifted).dataset[:]["image"]
        assert all(
            np.array_equal(np.asarray(one), np.asarray(two))
            for one, two in zip(images, twins, strict=True)
        )
        assert {image.mode for image in images} == {"L"}


def test_the_built_in_digits(tmp_path: Path) -> None:
    labels = [str(digit) for digit in reversed(range(10))]
    job = make_job(labels, task="image", sites=4, train="builtin:digits")
    sites = prepare_sites(job, tmp_path)
    assert sum(site.examples for site in sites) == 1257
    assert sum(site.test_examples for site in sites) == 540
    zeros = sum(site.classes[9] for site in sites)
    assert 100 < zeros < 150
    with pytest.raises(JobError, match="has label '0', the job has not") as caught:
        prepare_sites(make_job(task="image", sites=4, train="builtin:digits"), tmp_path)
    assert "labels = " in caught.value.hint


@pytest.mark.parametrize(
    ("simulation", "message"),
    [
        ({"train": "x.csv"}, "simulation.sites is missing"),
        ({"train": "x.csv", "sites": 2, "shift": "image"}, "needs images"),
        ({"train": "builtin:digits", "sites": 2}, "are images"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, simulation: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        prepare_sites(make_job(**simulation), tmp_path)
    assert caught.value.hint


def test_a_job_without_simulation(tmp_path: Path) -> None:
    job = make_job(train="x.csv", sites=2).for_sites()
    with pytest.raises(JobError, match=r"no \[simulation\]"):
        prepare_sites(job, tmp_path)


def test_images_left_out_are_counted_and_stay_counted(tmp_path: Path) -> None:
    train = write_images(tmp_path / "data", 30)
    (tmp_path / "data" / "a" / "broken.png").write_bytes(b"not an image")
    job = make_job(task="image", sites=2, train=train)
    job = job.model_copy(update={"data": job.data.model_copy(update={"on_bad_image": "skip"})})
    for _ in range(2):  # written, then found again
        assert partition_module.prepare_sites(job, tmp_path / "cache").skipped == 1


def test_a_natural_partition_with_fewer_sites_than_the_cohort_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_rows(tmp_path / name / "train.jsonl", 20)
    pattern = str(tmp_path / "*" / "train.jsonl")
    job = make_job(train=pattern, partition={"kind": "natural"})
    job = job.model_copy(update={"rounds": Rounds(cohort=3)})
    with pytest.raises(JobError, match="cohort = 3 is larger than the 2 sites"):
        prepare_sites(job, tmp_path / "cache")
