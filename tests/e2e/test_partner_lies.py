"""Sites that send nonsense, are late or too few: it costs their own update, and is told.

Processes as partners run them; one of the three is a ``faulty_site.py``.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.faulty_site import ALTERED
from e2e.partners import NGINX, Partners
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.common.config.job import Job
from fedgraft.common.federation.audit_log import read
from fedgraft.server.protocol.transport import SILENT
from fedgraft.server.runs.run_folder import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

LIAR = "site-02"
MASKED = "privacy.secure_aggregation.enabled=true"
LIES = {
    **{name: code for name, (_, code) in ALTERED.items()},
    "other": "malformed",
    "replayed": "bad-seal",
}


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("p")  # short: it holds sockets
    with Partners(folder, job_of(folder)) as running:
        running.join_all()
        running.start_sites(["site-00", "site-01"])
        yield running


@pytest.fixture(autouse=True)
def only_one_liar(partners: Partners) -> Iterator[None]:
    yield
    partners.end(LIAR)


def job_of(folder: Path, *overrides: str) -> Job:
    return digits_job(*write_digits(folder / "digits", 60, 30), *overrides)


def drops(partners: Partners, run: str) -> list[tuple[int, str, str]]:
    return [
        (line["round"], drop["site"], drop["reason"])
        for line in partners.rounds(run)
        for drop in line["dropped"]
    ]


def test_what_a_site_sends_that_is_no_update_costs_its_own_and_nobody_else_anything(
    partners: Partners, tmp_path: Path
) -> None:
    """One kind of nonsense a round, correctly signed; the result is that without the site."""
    partners.start_faulty(LIAR, *LIES)
    rounds = f"rounds.count={len(LIES)}"
    job = job_of(tmp_path, rounds, "rounds.min_sites=2", "rounds.deadline='60s'")
    with partners.running(job) as run:
        partners.until(lambda: partners.state(run) == "finished")
        expected = [(number, LIAR, code) for number, code in enumerate(LIES.values(), 1)]
        assert drops(partners, run) == expected
        assert [line["sites"] for line in partners.rounds(run)] == [2] * len(LIES)
        truth = partners.simulate(job, tmp_path, without=[LIAR])
        there = Run(partners.home / "runs" / run)
        np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-5)
        (line,) = [one for one in partners.status()["runs"] if one["run"] == run]
        assert line["dropped"] == len(LIES)


def test_a_slow_site_is_dropped_at_the_deadline_and_its_late_update_counts_nowhere(
    partners: Partners, tmp_path: Path
) -> None:
    partners.start_faulty(LIAR, "late")
    options = ("rounds.count=6", "rounds.min_sites=2", "rounds.deadline='8s'")
    job = job_of(tmp_path, *options)
    with partners.running(job) as run:
        partners.until(lambda: partners.state(run) == "finished")
        lost = drops(partners, run)
        assert lost[0][:2] == (1, LIAR) and len(lost) < 6
        assert {(site, reason in SILENT) for _, site, reason in lost} == {(LIAR, True)}
        assert partners.rounds(run)[0]["seconds"] < 12
        assert [line["sites"] for line in partners.rounds(run)][-1] == 3  # it is back
        (line,) = [one for one in partners.status()["runs"] if one["run"] == run]
        assert line["dropped"] == len(lost)


def test_below_min_sites_nothing_is_aggregated_or_unmasked_until_they_are_back(
    partners: Partners, tmp_path: Path
) -> None:
    """The third site takes part in the masks of three attempts, and is late with each input."""
    partners.start_faulty(LIAR, *["late"] * 3)
    options = (MASKED, "rounds.count=2", "rounds.min_sites=3", "rounds.deadline='8s'")
    with partners.running(job_of(tmp_path, *options)) as run:
        partners.until(lambda: "waiting" in why(partners, run))
        assert f"only 2 of 3 sites survived ({LIAR}: " in why(partners, run)
        assert partners.state(run) == "running" and partners.rounds(run) == []
        assert not list((partners.home / "runs" / run / "checkpoints").iterdir())
        session = Run(partners.home / "runs" / run).session
        for name in ("site-00", "site-01"):
            assert {"train"} <= stages(partners, name, session)
            assert not stages(partners, name, session) & {"query.confirm", "query.unmask"}
        partners.until(lambda: partners.state(run) == "finished")
        assert [line["sites"] for line in partners.rounds(run)] == [3, 3]
        assert "query.unmask" in stages(partners, "site-00", session)


def why(partners: Partners, run: str) -> str:
    return next((one["why"] for one in partners.status()["runs"] if one["run"] == run), "")


def stages(partners: Partners, name: str, session: str) -> set[str]:
    """What a site was asked in a run."""
    lines = read(partners.folder / name / "state" / "audit.jsonl")
    return {line["stage"] for line in lines if line["run"] == session}
