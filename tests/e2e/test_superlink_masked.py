"""Masked rounds over a real SuperLink: the same sums, also when a site is killed at any stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.superlink import Federation
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.client.site_config import dump_site, load_site
from fedgraft.common.config.job import Job
from fedgraft.server.app import coordinate
from fedgraft.server.protocol.transport import SILENT, Transport
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.identities import FILE, found_federation
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare

MASKED = ("privacy.secure_aggregation.enabled=true", "rounds.count=1", "simulation.sites=4")


def masked_job(folder: Path, *overrides: str) -> Job:
    return digits_job(*write_digits(folder / "digits", 80, 30), *MASKED, *overrides)


def sites_of(job: Job) -> dict[str, Path]:
    prepared = prepare(job)
    return {site.name: prepared.folder / site.name / "site.toml" for site in prepared.sites}


def run_here(job: Job, folder: Path, sites: Sequence[str]) -> Run:
    """The job on a grid in this process, with these of its sites."""
    found_federation(job, folder, sites)
    nodes = [
        {
            "site": str(config),
            "state": str(folder / name),
            "device": "cpu",
            "federation": str(folder / FILE),
        }
        for name, config in sites_of(job).items()
        if name in sites
    ]
    federation = found_federation(job, folder, sites)
    with Run.open_or_create(folder / "run", job) as run, Workers(0, device="cpu") as workers:
        coordinate(Transport(LocalGrid(nodes, workers)), job, run, federation=federation)
    return run


def joined(job: Job, folder: Path) -> dict[str, Path]:
    """What the sites have on their disks when they have joined: identity, federation, config."""
    found_federation(job, folder / "state", list(sites_of(job)))
    configs = {}
    for name, path in sites_of(job).items():
        config = load_site(path).model_copy(update={"federation": str(folder / "state" / FILE)})
        configs[name] = folder / f"{name}.toml"
        configs[name].write_text(dump_site(config), encoding="utf-8")
    return configs


def run_there(job: Job, folder: Path, kill_at: str = "") -> Run:
    """The job on a real SuperLink; site-01 dies once it has begun the stage ``kill_at``."""
    configs = joined(job, folder)
    with Federation(folder, configs) as federation:
        federation.submit(job, folder / "run", federation=str(folder / "state" / FILE))
        if kill_at:
            claims = folder / "state" / "site-01"
            federation.until(
                lambda: any(f"1 {kill_at}\n" in f.read_text() for f in claims.glob("*/claims"))
            )
            federation.kill("site-01")
        assert federation.wait() == "finished:completed"
    return Run(folder / "run")


def dropped_of(run: Run) -> list[Any]:
    return [event for event in run.events() if event["event"] in ("dropped", "warning")]


@pytest.mark.slow
def test_masked_rounds_over_a_superlink_come_to_the_bits_of_the_simulation(tmp_path: Path) -> None:
    job = masked_job(tmp_path, "rounds.count=2", "rounds.deadline='100s'")
    truth = run_here(job, tmp_path / "here", list(sites_of(job)))
    run = run_there(job, tmp_path / "there")
    assert not dropped_of(run)
    assert [line["masked"]["survivors"] for line in run.history()] == [4, 4]
    np.testing.assert_array_equal(adapter_of(run), adapter_of(truth))  # sums in any order
    for one, other in zip(run.history(), truth.history(), strict=True):
        assert one["validation"] == other["validation"]
        assert one["train_loss"] == other["train_loss"]


BESIDE = {
    "coral": ("training.domain={kind='coral'}", "simulation.unlabelled=['site-01']"),
    "dann": ("training.domain={kind='dann'}", "simulation.unlabelled=['site-01']"),
    "consolidation": ("training.consolidation={}",),
    "partial": ("method.kind=partial", "method.blocks=1"),
    "fedsa": ("aggregation.rule=fedsa",),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BESIDE)
def test_whatever_travels_comes_to_the_bits_of_the_simulation(kind: str, tmp_path: Path) -> None:
    """Sites without labels, statistics beside the adapter, whole blocks of a backbone."""
    job = masked_job(tmp_path, "rounds.count=2", "rounds.deadline='100s'", *BESIDE[kind])
    truth = run_here(job, tmp_path / "here", list(sites_of(job)))
    run = run_there(job, tmp_path / "there")
    assert not dropped_of(run)
    adapter = adapter_of(run)
    np.testing.assert_array_equal(adapter, adapter_of(truth))
    assert adapter.any()


@pytest.mark.slow  # each waits out a deadline for the site that died
@pytest.mark.parametrize(
    ("stage", "survivors"),
    [
        ("KEYS", {3}),
        ("SHARES", {3}),
        ("TRAIN", {3, 4}),  # its masked input may or may not have left before it died
        ("CONFIRM", {4}),
        ("UNMASK", {4}),
    ],
)
def test_a_site_that_is_killed_at_a_stage_leaves_an_exact_sum(
    tmp_path: Path, stage: str, survivors: set[int]
) -> None:
    job = masked_job(tmp_path, "rounds.deadline='30s'")
    run = run_there(job, tmp_path / "there", kill_at=stage)
    names = list(sites_of(job))
    (line,) = run.history()
    assert line["masked"]["survivors"] == line["sites"]
    assert line["sites"] in survivors
    inside = names if line["sites"] == 4 else [name for name in names if name != "site-01"]
    truth = run_here(job, tmp_path / "here", inside)
    np.testing.assert_array_equal(adapter_of(run), adapter_of(truth))
    assert {event["site"] for event in dropped_of(run)} <= {"site-01"}
    assert {event["reason"].removeprefix("evaluation: ") for event in dropped_of(run)} <= SILENT
