"""Disks that are full, and checkpoints that are no longer what was written: nothing is lost.

Processes as partners run them; the coordinator's home and one site's state are small disks.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.disks import filled, small_disk, why_not
from e2e.partners import NGINX, Partners
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.common.config.job import Job
from fedgraft.common.federation.audit_log import read, verify
from fedgraft.server.runs.run_folder import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

SMALL = "site-02"


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("p")  # short: it holds sockets
    if reason := why_not(folder):
        pytest.skip(reason)
    with ExitStack() as stack:
        stack.enter_context(small_disk(folder / "coordinator", 200))
        stack.enter_context(small_disk(folder / SMALL, 100))
        running = stack.enter_context(Partners(folder, job_of(folder)))
        running.join_all()
        running.start_sites()
        yield running


def job_of(folder: Path, *overrides: str) -> Job:
    options = ("rounds.min_sites=2", "rounds.deadline='60s'", *overrides)
    return digits_job(*write_digits(folder / "digits", 60, 30), *options)


def line_of(partners: Partners, run: str) -> dict[str, Any]:
    """What `fedgraft coordinator status` says of a run."""
    return next((one for one in partners.status()["runs"] if one["run"] == run), {})


def checkpoints(partners: Partners, run: str) -> list[Path]:
    """Oldest round first."""
    return sorted((partners.home / "runs" / run / "checkpoints").glob("round-*.safetensors"))


def test_a_coordinator_with_a_full_disk_rests_and_says_so_and_goes_on(
    partners: Partners, tmp_path: Path
) -> None:
    job = job_of(tmp_path, "rounds.count=12")
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 2)
        with filled(partners.home):
            partners.until(lambda: "paused: only 0 MB free" in line_of(partners, run)["why"])
            time.sleep(3.0)
            done, kept = len(partners.rounds(run)), checkpoints(partners, run)
            time.sleep(5.0)
            assert len(partners.rounds(run)) == done < 12
            assert checkpoints(partners, run) == kept
            assert "paused: only" in partners.read("coordinator.log")
        partners.until(lambda: partners.state(run) == "finished")
        there = Run(partners.home / "runs" / run)
        assert [line["round"] for line in there.history()] == list(range(1, 13))
        truth = partners.simulate(job, tmp_path)
        np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-6)
        verify(partners.home / "audit.jsonl")


@pytest.mark.parametrize("left", [0, 20 << 20], ids=["full", "almost"])
def test_a_site_with_a_full_disk_refuses_before_it_trains(
    partners: Partners, tmp_path: Path, left: int
) -> None:
    """Full, it may not even be able to record that."""
    state = partners.folder / SMALL / "state"
    job = job_of(tmp_path, "rounds.count=30")
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 1)
        with filled(partners.folder / SMALL, left=left):
            partners.until(lambda: partners.rounds(run)[-1]["sites"] == 2)
            reasons = {drop["reason"] for drop in partners.rounds(run)[-1]["dropped"]}
            assert reasons & ({"disk-full"} if left else {"disk-full", "audit-failed"})
            sent = set((state / "sent").glob("*/*/train-*"))
            done = len(partners.rounds(run))
            partners.until(lambda: len(partners.rounds(run)) > done + 1)
            assert set((state / "sent").glob("*/*/train-*")) <= sent
        partners.until(lambda: partners.rounds(run)[-1]["sites"] == 3)
        assert list(read(state / "audit.jsonl"))  # whole


def test_a_damaged_checkpoint_costs_a_round_and_is_told(partners: Partners, tmp_path: Path) -> None:
    job = job_of(tmp_path, "rounds.count=6", "rounds.min_sites=3")
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 3)
        partners.kill("coordinator")
        newest = checkpoints(partners, run)[-1]
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        partners.start_coordinator()
        partners.until(lambda: partners.state(run) == "finished")
        there = Run(partners.home / "runs" / run)
        assert [line["round"] for line in there.history()] == list(range(1, 7))
        (warning,) = line_of(partners, run)["warnings"]
        assert warning.endswith(f" checkpoint {newest.name} is damaged")
        (resumed,) = [event for event in there.events() if event["event"] == "resumed"]
        assert f"round-{resumed['round'] + 1:06d}" in newest.name
        truth = partners.simulate(job, tmp_path)
        np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-6)


def test_without_a_good_checkpoint_nothing_begins_anew_until_one_is_restored(
    partners: Partners, tmp_path: Path
) -> None:
    job = job_of(tmp_path, "rounds.count=6", "rounds.min_sites=3")
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 3)
        partners.kill("coordinator")
        backup = {path: path.read_bytes() for path in checkpoints(partners, run)}
        for path, content in backup.items():
            path.write_bytes(content[: len(content) // 2])
        partners.start_coordinator()
        partners.until(lambda: "none of the 2 checkpoints" in line_of(partners, run)["why"])
        assert "restore one from a backup" in line_of(partners, run)["why"]
        assert "none of the 2 checkpoints" in partners.read("coordinator.log")
        assert partners.state(run) == "running"
        assert checkpoints(partners, run) == list(backup)
        for path, content in backup.items():
            path.write_bytes(content)
        partners.until(lambda: partners.state(run) == "finished")
        truth = partners.simulate(job, tmp_path)
        there = Run(partners.home / "runs" / run)
        np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-6)
