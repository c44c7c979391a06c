"""Identities of simulated sites are made once, are real ones, and stay where they belong."""

import stat
from pathlib import Path

import pytest
from support.federations import digits_job

from fedgraft.client.membership.identity import load_identity
from fedgraft.common.errors import JobError
from fedgraft.common.federation.federation_file import load_federation
from fedgraft.simulations.grid.identities import FILE, found_federation

MASKED = "privacy.secure_aggregation.enabled=true"
NAMES = ("site-b", "site-a", "site-c")


def test_every_site_gets_a_key_of_its_own_that_only_it_can_read(tmp_path: Path) -> None:
    federation = found_federation(digits_job(MASKED), tmp_path, NAMES)
    assert federation is not None and federation.names == ("site-a", "site-b", "site-c")
    assert len(set(federation.sites.values())) == 3
    for name in NAMES:
        assert load_identity(tmp_path / name).public.hex() == federation.sites[name]
        assert stat.S_IMODE((tmp_path / name / "identity.pem").stat().st_mode) == 0o600
    assert load_federation(tmp_path / FILE) == federation
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, *sorted(NAMES)]


def test_the_federation_file_holds_no_private_key(tmp_path: Path) -> None:
    found_federation(digits_job(MASKED), tmp_path, NAMES)
    written = (tmp_path / FILE).read_text()
    for name in NAMES:
        pem = (tmp_path / name / "identity.pem").read_text().splitlines()
        assert pem[1] not in written and "PRIVATE" not in written


def test_a_resumed_run_finds_the_same_federation(tmp_path: Path) -> None:
    job = digits_job(MASKED)
    first = found_federation(job, tmp_path, NAMES)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found_federation(job, tmp_path, NAMES) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_one_that_died_while_it_was_founded_keeps_the_keys_it_made(tmp_path: Path) -> None:
    job = digits_job(MASKED)
    first = found_federation(job, tmp_path, NAMES)
    (tmp_path / FILE).unlink()
    assert found_federation(job, tmp_path, NAMES) == first


def test_two_runs_have_no_key_in_common(tmp_path: Path) -> None:
    job = digits_job(MASKED)
    one, other = (found_federation(job, tmp_path / name, NAMES) for name in ("one", "other"))
    assert one is not None and other is not None
    assert set(one.sites.values()).isdisjoint(other.sites.values())


@pytest.mark.parametrize(
    ("override", "bits", "clip"),
    [
        ("privacy.secure_aggregation.clip=0.02", 24, 0.02),
        ("privacy.secure_aggregation.clip=7.0", 24, 7.0),
        ("privacy.secure_aggregation.max_sites=500", 32, 0.1),
    ],
)
def test_the_floor_is_what_the_job_asks_for(
    tmp_path: Path, override: str, bits: int, clip: float
) -> None:
    federation = found_federation(digits_job(MASKED, override), tmp_path, NAMES)
    assert federation is not None
    assert (federation.policy.min_ring_bits, federation.policy.max_clip) == (bits, clip)


def test_without_secure_aggregation_nothing_is_made(tmp_path: Path) -> None:
    assert found_federation(digits_job(), tmp_path / "sites", NAMES) is None
    assert not (tmp_path / "sites").exists()


def test_a_federation_file_that_is_damaged_is_not_replaced(tmp_path: Path) -> None:
    job = digits_job(MASKED)
    found_federation(job, tmp_path, NAMES)
    (tmp_path / FILE).write_text("[sites")
    with pytest.raises(JobError):
        found_federation(job, tmp_path, NAMES)
    assert (tmp_path / FILE).read_text() == "[sites"
