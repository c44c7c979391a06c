"""Faults end to end: the federation goes on, ends in the same bytes, and says what hit it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.federations import adapter_of, digits_job, run_digits, write_digits

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.console import Console
from fedgraft.common.layout import Vector
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.faults.plan import choose_sites
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

F = "simulation.faults."
EVERYTHING = (
    F + "dropout=0.3",
    F + "stragglers=0.4",
    F + "delay=20m",
    F + "poisoned=0.2",
    F + "poison=noise",
    "simulation.sites=5",
    "rounds.count=4",
)
MASKED = ("privacy.secure_aggregation.enabled=true", "privacy.secure_aggregation.dropouts=0.4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_digits(tmp_path_factory.mktemp("digits"), 100, 50)


def told(run: Run) -> list[dict[str, Any]]:
    """All that the rounds came to but how long they took."""
    return [{**line, "seconds": 0} for line in run.history()]


def drops(run: Run) -> list[tuple[int, str, str]]:
    return [
        (line["round"], drop["site"], drop["reason"])
        for line in run.history()
        for drop in line["dropped"]
    ]


# The same every time


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "clear"])
def test_faults_are_the_same_for_any_number_of_workers(
    tmp_path: Path, data: tuple[str, ...], masked: bool
) -> None:
    poison = (F + "poison=labels", *MASKED) if masked else ()
    job = (*data, *EVERYTHING, *poison)
    alone, first = run_digits(tmp_path, *job, "simulation.workers=0")
    forked, second = run_digits(tmp_path, *job, "simulation.workers=2")
    assert adapter_of(alone).tobytes() == adapter_of(forked).tobytes()
    assert told(alone) == told(forked)
    assert first["faults"] == second["faults"]
    assert {"deadline"} <= {reason for _, _, reason in drops(alone)}
    assert first["faults"]["waited"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "clear"])
def test_a_run_with_faults_resumes_to_the_same_bytes(
    tmp_path: Path, data: tuple[str, ...], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = (F + "poison=labels", *MASKED) if masked else ()
    job = (*data, *EVERYTHING, *poison, "method.head=local", "simulation.workers=0")
    whole, summary = run_digits(tmp_path / "whole", *job)
    commit = Run.commit

    def crash(run: Run, state: Any, record: Any, layout: Any) -> None:
        if record.round == 3:
            raise KeyboardInterrupt
        commit(run, state, record, layout)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "commit", crash)
        run_digits(tmp_path / "stopped", *job)
    (folder,) = (tmp_path / "stopped").iterdir()
    with Run(folder) as run:
        resumed = simulate(prepare(run.job), run, Console(quiet=True))
    assert adapter_of(run).tobytes() == adapter_of(whole).tobytes()
    assert told(run) == told(whole)
    assert resumed["faults"] == summary["faults"]
    assert [event["event"] for event in run.events()].count("resumed") == 1


# Late, and lost


def test_sites_beyond_the_deadline_are_dropped_and_the_run_goes_on(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    slow = (F + "stragglers=0.34", F + "delay=1000d", "rounds.deadline=30m")
    run, summary = run_digits(tmp_path, *data, *slow)
    (site,) = summary["faults"]["slow_sites"]
    assert drops(run) == [(number, site, "deadline") for number in (1, 2, 3)]
    assert [line["sites"] for line in run.history()] == [2, 2, 2]
    assert summary["faults"]["waits"] == [{"round": n, "seconds": 1800.0} for n in (1, 2, 3)]


@pytest.mark.slow
def test_a_late_site_costs_time_and_nothing_else(tmp_path: Path, data: tuple[str, ...]) -> None:
    clean, nothing = run_digits(tmp_path, *data)
    run, summary = run_digits(
        tmp_path, *data, F + "stragglers=0.34", F + "delay=1s", "rounds.deadline=1h"
    )
    assert nothing["faults"] is None
    assert drops(run) == [] and 0 < summary["faults"]["waited"] < 100
    np.testing.assert_allclose(adapter_of(run), adapter_of(clean), atol=1e-6)  # another order


def test_masked_rounds_go_on_without_those_who_vanish(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    sites = ("simulation.sites=8", "rounds.count=4", F + "dropout=0.2")
    run, _ = run_digits(tmp_path, *data, *MASKED, *sites)
    history = run.history()
    assert [line["round"] for line in history] == [1, 2, 3, 4]
    assert {reason for _, _, reason in drops(run)} == {"deadline"}
    assert all(line["masked"]["survivors"] == line["sites"] for line in history)
    assert min(line["sites"] for line in history) < 8


# Poison


def test_a_nan_costs_its_own_site_and_nobody_else(tmp_path: Path, data: tuple[str, ...]) -> None:
    run, summary = run_digits(tmp_path, *data, F + "poisoned=0.34", F + "poison=nan")
    (site,) = summary["faults"]["poisoned_sites"]
    assert drops(run) == [(number, site, "not-finite") for number in (1, 2, 3)]
    assert [line["sites"] for line in run.history()] == [2, 2, 2]
    assert np.isfinite(adapter_of(run)).all()


def start_of(job: Job) -> Vector:
    bench = open_workbench(job)
    return bench.initial_of(make_plan(job, bench, "").exchanged)


@pytest.mark.slow
def test_one_large_site_that_flips_signs_turns_the_mean_around_and_not_the_median(
    tmp_path: Path,
) -> None:
    """Among sites of one size a median may do as badly: it counts sites, a mean examples."""
    names = ("large", "one", "two", "three", "four")
    seed = next(s for s in range(99) if choose_sites(names, 0.2, s, "poisoned") == ("large",))
    for name in names:
        write_digits(tmp_path / "data" / name, 200 if name == "large" else 30, 20)
    job = (
        f"simulation.train={tmp_path}/data/*/train",
        f"simulation.test={tmp_path}/data/*/test",
        "simulation.partition={kind='natural'}",
        "simulation.sites=5",
        "simulation.shift=none",
        "rounds.count=1",
        "training.batch_size=16",
        f"job.seed={seed}",
    )
    towards = {}
    for rule in ("fedavg", "median"):
        both = [
            (*job, f"aggregation.rule={rule}", F + f"poisoned={share}", F + "poison=sign-flip")
            for share in (0, 0.2)
        ]
        clean, poisoned = (
            adapter_of(run_digits(tmp_path / "runs", *one)[0]) - start_of(digits_job(*one))
            for one in both
        )
        towards[rule] = float(clean @ poisoned / (clean @ clean))
    assert towards["fedavg"] < 0 < 0.3 < towards["median"]


@pytest.mark.slow
def test_poisoned_labels_train_and_are_judged_by_true_ones(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    job = (*data, "training.batch_size=16", "rounds.count=4")
    _, clean = run_digits(tmp_path, *job)
    run, poisoned = run_digits(tmp_path, *job, F + "poisoned=1")
    assert drops(run) == []
    final = [summary["final"]["federated"]["accuracy"] for summary in (clean, poisoned)]
    assert final[0] > 0.6 and final[1] < 0.4


# Whoever reads the run sees it


def test_a_run_with_faults_says_so_wherever_it_is_read(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    job = digits_job(*data, *EVERYTHING, "rounds.count=2")
    with Run.create(tmp_path, job) as run:
        summary = simulate(prepare(job), run, Console())
    faults = summary["faults"]
    assert len(faults["slow_sites"]) == 2 and len(faults["poisoned_sites"]) == 1
    assert (faults["dropout"], faults["delay"], faults["poison"]) == (0.3, 1200.0, "noise")
    (event,) = [one for one in run.events() if one["event"] == "faults"]
    assert event["slow_sites"] == faults["slow_sites"]
    assert json.loads((run.folder / "summary.json").read_text())["faults"] == faults
    seen = capsys.readouterr().err
    report = (run.folder / "report.html").read_text()
    card = (run.folder / "adapter" / "README.md").read_text()
    assert "faults on purpose" in seen and "Faults on purpose" in report
    assert "Faults on purpose" in card
    for site in (*faults["slow_sites"], *faults["poisoned_sites"]):
        assert site in seen and site in report


def test_a_run_without_faults_says_nothing_of_them(tmp_path: Path, data: tuple[str, ...]) -> None:
    run, summary = run_digits(tmp_path, *data, "rounds.count=1")
    assert summary["faults"] is None
    assert not [one for one in run.events() if one["event"] in ("faults", "waited")]
    assert "aults on purpose" not in (run.folder / "report.html").read_text()
    assert "aults on purpose" not in (run.folder / "adapter" / "README.md").read_text()
