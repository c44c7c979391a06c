"""A federation over a network that is slow, loses frames and is cut: namespaces, as root."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from e2e.netlab import Network, Wire, why_not
from e2e.partners import NGINX, Partners
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.common.config.job import Job
from fedgraft.server.protocol.transport import SILENT
from fedgraft.server.runs.run_folder import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

SITES = ("site-00", "site-01", "site-02")
FAR = Wire(delay=0.025, loss=0.02)  # 50 ms there and back
CUT = "site-01"


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("p")  # short: it holds sockets
    with ExitStack() as stack:
        network = Network(["coordinator", *SITES], slow={"site-02": FAR})
        stack.enter_context(network)
        running = stack.enter_context(Partners(folder, job_of(folder), network=network))
        running.join_all()
        running.start_sites()
        yield running


def job_of(folder: Path, *overrides: str) -> Job:
    return digits_job(*write_digits(folder / "digits", 60, 30), *overrides)


@pytest.mark.parametrize("masked", [False, True], ids=["clear", "masked"])
def test_a_run_completes_with_latency_loss_and_a_narrow_link(
    partners: Partners, tmp_path: Path, masked: bool
) -> None:
    assert partners.network is not None
    partners.network.limit("site-00", 8)
    more = ("privacy.secure_aggregation.enabled=true",) if masked else ()
    job = job_of(tmp_path, "rounds.count=3", "rounds.min_sites=3", "rounds.deadline='60s'", *more)
    with partners.running(job) as run:
        partners.until(lambda: partners.state(run) == "finished")
        there = Run(partners.home / "runs" / run)
        assert [line["sites"] for line in there.history()] == [3] * 3
        print("seconds a round", [round(line["seconds"], 2) for line in there.history()])
        if not masked:
            truth = partners.simulate(job, tmp_path)
            np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-5)


def test_a_site_that_is_cut_off_costs_its_own_update_and_is_back_when_it_can(
    partners: Partners, tmp_path: Path
) -> None:
    """Cut while it trains: what it then has to say belongs to a round that is over."""
    assert partners.network is not None
    for name in SITES:
        partners.write_policy(name, limits={"max_rounds": 500})
    job = job_of(tmp_path, "rounds.count=500", "rounds.min_sites=2", "rounds.deadline='6s'")
    with partners.running(job) as run:
        partners.until(lambda: len(partners.rounds(run)) >= 2)
        partners.network.cut(CUT)
        done = len(partners.rounds(run))
        partners.until(lambda: len(partners.rounds(run)) >= done + 4)
        assert [line["sites"] for line in partners.rounds(run)[done + 1 :]] == [2] * 3
        partners.network.heal(CUT)
        healed = time.monotonic()
        partners.until(lambda: partners.rounds(run)[-1]["sites"] == 3)
        print(f"back {time.monotonic() - healed:.1f} s after the network")
        lost = [drop for line in partners.rounds(run) for drop in line["dropped"]]
        assert {drop["site"] for drop in lost} == {CUT}
        assert {drop["reason"] for drop in lost} <= SILENT
        back = len(partners.rounds(run))
        partners.until(lambda: len(partners.rounds(run)) >= back + 3)
        assert [line["sites"] for line in partners.rounds(run)[back:]] == [3] * 3
