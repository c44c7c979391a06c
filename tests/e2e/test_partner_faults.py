"""What must happen when a process of a federation is killed, or its certificate runs out."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.partners import NGINX, Partners
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.client.membership.state_files import AUDIT
from fedgraft.common.config.job import Job
from fedgraft.common.federation.audit_log import verify
from fedgraft.common.federation.certificates import serial
from fedgraft.server.protocol.transport import SILENT
from fedgraft.server.runs.run_folder import Run

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def job_of(folder: Path, *overrides: str) -> Job:
    return digits_job(*write_digits(folder / "digits", 60, 30), *overrides)


@pytest.fixture
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("p")  # short: it holds sockets
    with Partners(folder, job_of(folder), lifetime="200s") as running:
        running.join_all()
        running.start_sites()
        yield running


@pytest.mark.slow  # the certificate is renewed after a minute
def test_a_coordinator_that_is_killed_goes_on_and_sites_renew_their_certificates(
    partners: Partners, tmp_path: Path
) -> None:
    """The certificates live for minutes, so that they are renewed on the way."""
    job = job_of(tmp_path, "rounds.count=8", "rounds.min_sites=3", "rounds.deadline='60s'")
    state = partners.folder / "site-00" / "state" / "certificate.pem"
    before = serial(state.read_bytes())
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 2)
        restart(partners, run)
        partners.until(lambda: partners.state(run) == "finished")
        there = Run(partners.home / "runs" / run)
        assert [line["round"] for line in there.history()] == list(range(1, 9))  # each done once
        assert [line["sites"] for line in there.history()] == [3] * 8
        truth = partners.simulate(job, tmp_path)
        np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-6)
        partners.until(lambda: serial(state.read_bytes()) != before)
        partners.until(lambda: "was renewed" in partners.read("site-00.log"), 10)


def restart(partners: Partners, run: str) -> float:
    """Kill the coordinator and start it again; the seconds until it has committed a round."""
    partners.kill("coordinator")
    killed, done = time.monotonic(), len(partners.rounds(run))
    partners.start_coordinator()
    partners.until(lambda: len(partners.rounds(run)) > done)
    seconds = time.monotonic() - killed
    print(f"goes on after {seconds:.1f} s")
    assert seconds < 60
    return seconds


@pytest.mark.slow  # five restarts
def test_a_masked_run_whose_coordinator_is_killed_at_each_stage_ends_in_the_same_bits(
    partners: Partners, tmp_path: Path
) -> None:
    masked = "privacy.secure_aggregation.enabled=true"
    job = job_of(tmp_path, masked, "rounds.count=25", "rounds.min_sites=3", "rounds.deadline='60s'")
    with partners.running(job) as run:
        audit = partners.folder / "site-00" / "state" / AUDIT
        for stage in ("query.keys", "query.shares", "train", "query.confirm", "query.unmask"):
            done = len(partners.rounds(run))
            partners.until(lambda: len(partners.rounds(run)) > done)  # noqa: B023
            asked = audit.stat().st_size
            line = f'"stage":"{stage}"'.encode()
            partners.until(lambda: line in audit.read_bytes()[asked:])  # noqa: B023
            restart(partners, run)
        partners.until(lambda: partners.state(run) == "finished")
        again = partners.submit(job)
        partners.until(lambda: partners.state(again) == "finished")
        there, undisturbed = (Run(partners.home / "runs" / name) for name in (run, again))
        assert [line["round"] for line in there.history()] == list(range(1, 26))  # each done once
        assert [line["sites"] for line in there.history()] == [3] * 25
        assert adapter_of(there).tobytes() == adapter_of(undisturbed).tobytes()


@pytest.mark.slow  # Flower misses a site only after a minute
def test_a_site_that_is_killed_costs_its_own_update_and_comes_back(
    partners: Partners, tmp_path: Path
) -> None:
    for name in partners.data:
        partners.write_policy(name, limits={"max_rounds": 500})
    job = job_of(tmp_path, "rounds.count=500", "rounds.min_sites=2", "rounds.deadline='10s'")
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 2)
        state = partners.folder / "site-01" / "state"
        partners.kill("site-01")
        killed, recorded, spent = time.monotonic(), (state / AUDIT).read_bytes(), spent_of(state)
        partners.start_sites(["site-01"])
        partners.until(lambda: partners.rounds(run)[-1]["sites"] == 2)
        dropped = [drop for line in partners.rounds(run) for drop in line["dropped"]]
        assert {drop["site"] for drop in dropped} == {"site-01"}
        assert {drop["reason"] for drop in dropped} <= SILENT
        partners.until(lambda: partners.rounds(run)[-1]["sites"] == 3)
        print(f"back after {time.monotonic() - killed:.1f} s")
        assert time.monotonic() - killed < 90
        # What it had recorded and counted before is still there, and goes on.
        assert verify(state / AUDIT) > recorded.count(b"\n")
        assert (state / AUDIT).read_bytes().startswith(recorded[: recorded.rindex(b"\n") + 1])
        after = spent_of(state)
        assert spent and all(after[number] >= size for number, size in spent.items())


def spent_of(state: Path) -> dict[str, int]:
    """The bytes that a site has counted of what it sent, by round."""
    (path,) = (state / "approvals").glob("*.bytes")
    return dict(json.loads(path.read_text()))
