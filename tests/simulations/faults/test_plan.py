"""Who is hit, how often and how: the shares that were asked for, and the same every time."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.client.data.rows import read_split
from fedgraft.client.site_config import load_site
from fedgraft.common.config.faults import Faults
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.simulations.data.partition import SimulatedSite, prepare_sites
from fedgraft.simulations.faults.plan import NEVER, Fates, Step, choose_sites, wrong_labels

LABELS = ["a", "b", "c"]
SITES = [f"site-{number:03d}" for number in range(200)]
STEP = Step(3, 1, "train")


def make_fates(**faults: Any) -> Fates:
    settings = Faults(**faults)
    slow = tuple(SITES[:100]) if settings.stragglers else ()
    return Fates(settings, 7, slow, tuple(SITES[:1]) if settings.poisoned else ())


# Who


@pytest.mark.parametrize(
    ("share", "sites", "count"), [(0, 10, 0), (0.01, 10, 1), (0.2, 10, 2), (0.25, 7, 2), (1, 3, 3)]
)
def test_a_share_above_0_is_at_least_one_site(share: float, sites: int, count: int) -> None:
    assert len(choose_sites(SITES[:sites], share, 0, "slow")) == count


def test_who_is_hit_does_not_depend_on_the_order_of_sites_but_on_seed_and_purpose() -> None:
    chosen = choose_sites(SITES, 0.2, 0, "slow")
    assert chosen == choose_sites(SITES[::-1], 0.2, 0, "slow") == tuple(sorted(chosen))
    assert chosen != choose_sites(SITES, 0.2, 1, "slow")
    assert chosen != choose_sites(SITES, 0.2, 0, "poisoned")


# When


def test_sites_vanish_as_often_as_asked_and_at_every_stage_alike() -> None:
    fates = make_fates(dropout=0.3)
    stages = [fates.vanishes(Step(number, 0, "train"), s) for number in range(50) for s in SITES]
    count = Counter(stages)
    share = 1 - count[NEVER] / len(stages)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(stages)) ** 0.5
    assert set(count) == {*range(5), NEVER}
    for stage in range(5):
        assert abs(count[stage] / len(stages) - 0.06) < 0.01


def test_each_round_and_attempt_has_draws_of_its_own_and_its_two_halves_one() -> None:
    fates = make_fates(dropout=0.5)

    def draws(step: Step) -> list[int]:
        return [fates.vanishes(step, site) for site in SITES]

    assert draws(STEP) == draws(STEP) == draws(replace(STEP, work="evaluate"))
    assert draws(STEP) != draws(replace(STEP, round=4))
    assert draws(STEP) != draws(replace(STEP, attempt=0))


def test_delays_have_the_mean_that_was_asked_for_at_slow_sites_only() -> None:
    fates = make_fates(stragglers=0.5, delay="10m")
    delays = {site: [fates.delay(Step(n, 0, "train"), site) for n in range(50)] for site in SITES}
    assert not any(any(delays[site]) for site in SITES[100:])
    drawn = np.concatenate([delays[site] for site in SITES[:100]])
    assert drawn.min() > 0
    assert abs(drawn.mean() - 600) < 4 * 600 / len(drawn) ** 0.5
    assert np.mean(drawn > 600) == pytest.approx(np.exp(-1), abs=0.03)  # exponential
    assert fates.delay(STEP, SITES[0]) != fates.delay(replace(STEP, work="evaluate"), SITES[0])


# How


UPDATE = np.linspace(-1, 2, 1000, dtype=np.float32)


def test_each_poison_does_what_it_says_to_poisoned_sites_only() -> None:
    for poison in ("sign-flip", "noise", "nan"):
        fates = make_fates(poisoned=0.1, poison=poison)
        poisoned = fates.poison(UPDATE, STEP, SITES[0])
        assert poisoned.dtype == np.float32 and poisoned.shape == UPDATE.shape
        assert not np.array_equal(poisoned, UPDATE)
        assert np.array_equal(fates.poison(UPDATE, STEP, SITES[1]), UPDATE)
    flipped = make_fates(poisoned=0.1, poison="sign-flip").poison(UPDATE, STEP, SITES[0])
    assert np.array_equal(flipped, -UPDATE)
    assert np.isnan(make_fates(poisoned=0.1, poison="nan").poison(UPDATE, STEP, SITES[0])).all()
    labels = make_fates(poisoned=0.1, poison="labels")
    assert np.array_equal(labels.poison(UPDATE, STEP, SITES[0]), UPDATE)


def test_noise_has_the_updates_norm_and_another_direction_each_round() -> None:
    fates = make_fates(poisoned=0.1, poison="noise")
    noise = fates.poison(UPDATE, STEP, SITES[0])
    assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(UPDATE), rel=1e-5)
    assert abs(noise @ UPDATE) < 0.15 * np.linalg.norm(UPDATE) ** 2
    assert np.array_equal(noise, fates.poison(UPDATE, STEP, SITES[0]))
    assert not np.array_equal(noise, fates.poison(UPDATE, replace(STEP, round=4), SITES[0]))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_every_poisoned_label_is_wrong_and_a_label(classes: int) -> None:
    labels = np.arange(3 * classes, dtype=np.int64) % classes
    wrong = wrong_labels(labels, classes)
    assert (wrong != labels).all()
    assert sorted(set(wrong.tolist())) == list(range(classes))


# Poisoned sites on disk


def make_job(folder: Path, *, test: bool, **faults: Any) -> Job:
    for name, count in (("train", 60), ("test", 30)):
        rows = [{"text": f"{name} {n}", "label": LABELS[n % 3]} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(folder / "train.jsonl")}
    raw = {
        "job": {"name": "t", "task": "text-classification", "labels": LABELS},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "head"},
        "simulation": {
            **files,
            **({"test": str(folder / "test.jsonl")} if test else {}),
            "sites": 4,
            "partition": {"kind": "iid"},
            "faults": faults,
        },
    }
    return parse_job(raw, where="test")


def rows_of(job: Job, folder: Path, site: SimulatedSite, split: str) -> dict[str, int]:
    config = load_site(folder / site.name / "site.toml")
    rows = read_split(getattr(config.data, split), job).dataset[:]
    return dict(zip(rows["text"], rows["label"], strict=True))


@pytest.mark.parametrize("test", [True, False])
def test_poisoned_labels_are_wrong_in_training_and_right_in_test(
    tmp_path: Path, test: bool
) -> None:
    clean = make_job(tmp_path, test=test)
    job = make_job(tmp_path, test=test, poisoned=0.5)
    before, after = (prepare_sites(each, tmp_path / "cache") for each in (clean, job))
    pairs = list(zip(before.sites, after.sites, strict=True))
    fates = Fates.draw(job, [site.name for _, site in pairs])
    assert len(fates.poisoned) == 2
    for was, site in pairs:
        held = [rows_of(job, p.folder, s, "test") for p, s in ((before, was), (after, site))]
        assert held[0] == held[1]
        right = rows_of(job, before.folder, was, "train")
        found = rows_of(job, after.folder, site, "train")
        moved = {text: (label + 1) % 3 for text, label in right.items()}
        assert found == (moved if site.name in fates.poisoned else right)
        counts = np.bincount(list(found.values()), minlength=3)
        assert site.classes == tuple(counts.tolist())


def test_only_poisoned_labels_make_other_sites_on_disk(tmp_path: Path) -> None:
    def digest(**faults: Any) -> str:
        job = make_job(tmp_path, test=True, **faults)
        return prepare_sites(job, tmp_path / "cache").folder.name

    clean = digest()
    assert digest(dropout=0.5, stragglers=0.5) == clean
    assert digest(poisoned=0.5, poison="nan") == clean
    assert digest(poisoned=0.0, poison="labels") == clean
    assert len({clean, digest(poisoned=0.5), digest(poisoned=0.25)}) == 3


# What a run came to


def wait(number: int, seconds: float, stage: str = "train", attempt: int = 0) -> dict[str, Any]:
    return {
        "event": "waited",
        "round": number,
        "attempt": attempt,
        "work": stage,
        "stage": stage,
        "seconds": seconds,
    }


def test_a_stage_that_was_done_again_is_waited_for_once() -> None:
    events = [
        wait(2, 5.0),
        wait(1, 60.0, attempt=0),
        wait(1, 7.0, attempt=1),
        wait(2, 5.0),  # after a crash
        wait(2, 3.0, "evaluate"),
        {"event": "finished"},
    ]
    summary = make_fates(dropout=0.1).summary(events)
    assert summary["waits"] == [{"round": 1, "seconds": 67.0}, {"round": 2, "seconds": 8.0}]
    assert summary["waited"] == 75.0 and summary["longest_wait"]["round"] == 1
    assert make_fates(dropout=0.1).summary([])["longest_wait"] is None
