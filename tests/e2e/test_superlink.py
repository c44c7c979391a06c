"""The same apps over a real SuperLink: other processes, HTTP, and sites that die."""

from pathlib import Path

import numpy as np
import pytest
from e2e.superlink import Federation
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.common.config.job import Job
from fedgraft.server.app import coordinate
from fedgraft.server.protocol.transport import SILENT, Transport
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers
from fedgraft.simulations.preparation import prepare

COMPLETED = "finished:completed"


def small_job(folder: Path, *overrides: str) -> Job:
    """A federation of 60 digits, three sites and two rounds unless overridden."""
    return digits_job(*write_digits(folder / "digits", 60, 30), "rounds.count=2", *overrides)


def sites_of(job: Job) -> dict[str, Path]:
    prepared = prepare(job)
    return {site.name: prepared.folder / site.name / "site.toml" for site in prepared.sites}


def run_here(job: Job, folder: Path) -> Run:
    """The job on a grid in this process."""
    nodes = [
        {"site": str(config), "state": str(folder / "state" / name), "device": "cpu"}
        for name, config in sites_of(job).items()
    ]
    with Run.open_or_create(folder / "run", job) as run, Workers(0, device="cpu") as workers:
        coordinate(Transport(LocalGrid(nodes, workers)), job, run)
    return run


# As Flower ships it, every message costs seconds of imports: the least that shows it works.
@pytest.mark.slow  # test_superlink_masked.py goes the same way and further
@pytest.mark.parametrize(("warm", "sites", "rounds"), [(True, 3, 2), (False, 2, 1)])
def test_a_federation_comes_to_the_adapter_of_the_simulation(
    tmp_path: Path, warm: bool, sites: int, rounds: int
) -> None:
    options = (f"simulation.sites={sites}", f"rounds.min_sites={sites}", f"rounds.count={rounds}")
    job = small_job(tmp_path, *options, "rounds.deadline='150s'")
    truth = run_here(job, tmp_path / "here")
    with Federation(tmp_path / "there", sites_of(job), warm=warm) as federation:
        federation.submit(job, tmp_path / "run")
        assert federation.wait() == COMPLETED
    run = Run(tmp_path / "run")
    assert [line["sites"] for line in run.history()] == [sites] * rounds
    assert not [event for event in run.events() if event["event"] in ("dropped", "warning")]
    # Sites compute the same bits. But their updates are added as they arrive, in float64, and a
    # sum of three in another order may, rarely, round to another float32.
    np.testing.assert_allclose(adapter_of(run), adapter_of(truth), rtol=0, atol=1e-6)


@pytest.mark.slow  # both rounds wait out the deadline: Flower misses a node only after a minute
def test_a_site_that_is_killed_in_the_first_round_costs_its_own_update(tmp_path: Path) -> None:
    job = small_job(tmp_path, "rounds.min_sites=2", "rounds.deadline='20s'")
    with Federation(tmp_path / "there", sites_of(job)) as federation:
        federation.submit(job, tmp_path / "run")
        federation.until(lambda: "train message" in federation.log("site-01"))
        federation.kill("site-01")
        assert federation.wait() == COMPLETED
        assert not federation.alive("site-01") and federation.alive("site-02")
    run = Run(tmp_path / "run")
    assert [line["sites"] for line in run.history()] == [2, 2]
    dropped = [event for event in run.events() if event["event"] == "dropped"]
    assert {(event["round"], event["site"]) for event in dropped} == {
        (1, "site-01"),
        (2, "site-01"),
    }
    assert {event["reason"] for event in dropped} <= SILENT


@pytest.mark.slow
def test_nothing_survives_a_test_that_fails(tmp_path: Path) -> None:
    config = tmp_path / "site.toml"
    with (
        pytest.raises(ZeroDivisionError) as failed,
        Federation(tmp_path / "there", {"site-00": config}) as federation,
    ):
        names = ("coordinator", "site-00")
        assert all(federation.alive(name) for name in names)
        raise ZeroDivisionError
    assert not any(federation.alive(name) for name in names)
    assert any("SuperNode ID" in note for note in failed.value.__notes__)
