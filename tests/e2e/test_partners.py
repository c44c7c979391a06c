"""A federation of real processes: what it comes to, and how its sites come and go."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.partners import NGINX, Partners
from support.federations import adapter_of, digits_job, write_digits

from fedgraft.common.backbones.blob_store import BlobStore, make_manifest
from fedgraft.common.backbones.load import find_backbone
from fedgraft.common.config.job import Job
from fedgraft.common.federation.audit_log import verify
from fedgraft.server.app import coordinate
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.grid.identities import found_federation
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

MASKED = "privacy.secure_aggregation.enabled=true"


def small_job(folder: Path, *overrides: str) -> Job:
    options = ("rounds.count=3", "rounds.min_sites=3", "rounds.deadline='60s'", *overrides)
    return digits_job(*write_digits(folder / "digits", 60, 30), *options)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("partners")
    with Partners(folder, small_job(folder)) as running:
        running.join_all()
        running.start_sites()
        yield running


def run_here(partners: Partners, job: Job, folder: Path) -> Run:
    """The job as a simulation of the same sites."""
    federation = found_federation(job, folder / "state", sorted(partners.data))
    nodes = [
        {
            "site": str(data / "site.toml"),
            "state": str(folder / "state" / name),
            "device": "cpu",
            **({"federation": str(folder / "state" / "federation.toml")} if federation else {}),
        }
        for name, data in partners.data.items()
    ]
    with Run.open_or_create(folder / "run", job) as run, Workers(0, device="cpu") as workers:
        coordinate(Transport(LocalGrid(nodes, workers)), job, run, federation=federation)
    return run


@pytest.mark.parametrize("overrides", [(), (MASKED,)], ids=["clear", "masked"])
def test_partners_come_to_the_adapter_of_the_simulation(
    partners: Partners, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    job = small_job(partners.folder, *overrides)
    run = partners.submit(job)
    partners.until(lambda: partners.state(run) == "finished")
    (tmp_path / "state").mkdir()
    truth = run_here(partners, job, tmp_path)
    there = Run(partners.home / "runs" / run)
    assert [line["sites"] for line in there.history()] == [3, 3, 3]
    np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-5)
    assert (there.folder / "adapter" / "adapter_model.safetensors").exists()
    for name in partners.data:
        assert verify(partners.folder / name / "state" / "audit.jsonl") > 10
    verify(partners.home / "audit.jsonl")


def test_a_backbone_is_handed_out_once(partners: Partners) -> None:
    copy = partners.folder / "glyph"
    shutil.copytree(find_backbone("builtin:glyph-vit").folder, copy)
    manifest = make_manifest(copy, source="path:glyph")
    partners.allowed["glyph"] = f"sha256:{manifest.digest}"
    for name in partners.data:
        partners.write_policy(name)
    job = small_job(partners.folder, f"backbone.source='path:{copy}'", "rounds.count=1")
    run = partners.submit(job)
    partners.until(lambda: partners.state(run) == "finished")
    assert partners.rounds(run)[0]["sites"] == 3
    for name in partners.data:
        assert BlobStore(partners.folder / name / "state" / "backbones").complete(manifest)
    said = {name: partners.read(f"{name}.log").count("backbone: ") for name in partners.data}
    assert min(said.values()) >= 1
    again = partners.submit(job)
    partners.until(lambda: partners.state(again) == "finished")
    for name, before in said.items():
        assert partners.read(f"{name}.log").count("backbone: ") == before


# --- the doctor, and a site that was shut out


def doctor(partners: Partners, site: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and the state of each finding with what was seen."""
    path = str(partners.folder / site / "site.toml")
    done = partners.call("site", "doctor", "--site", path, "--json", check=False)
    return done.returncode, {
        one["name"]: (one["state"], one["what"]) for one in json.loads(done.stdout)["findings"]
    }


def test_the_doctor_finds_a_site_well_and_says_what_is_not(partners: Partners) -> None:
    code, found = doctor(partners, "site-00")
    assert code == 0
    assert {state for state, _ in found.values()} <= {"ok", "warn"}
    key = partners.folder / "site-00" / "state" / "tls.key"
    key.chmod(0o644)
    try:
        code, found = doctor(partners, "site-00")
    finally:
        key.chmod(0o600)
    assert code == 1
    assert found["keys"][0] == "fail"
    assert found["coordinator"][0] == "ok"


def test_a_revoked_site_is_out_and_comes_back_by_what_the_doctor_says(partners: Partners) -> None:
    """It comes back with the keys it had, so that the others see no other site."""
    partners.call("provision", "revoke", "site-02", "--home", str(partners.home))
    partners.until(lambda: "refused by" in partners.read("site-02.log"))
    states = {site["site"]: site["state"] for site in partners.status()["sites"]}
    assert states == {"site-00": "joined", "site-01": "joined", "site-02": "revoked"}
    code, found = doctor(partners, "site-02")
    assert code == 1
    assert found["coordinator"] == ("fail", "certificate revoked or unknown")
    folder = partners.folder / "site-02"
    identity = (folder / "state" / "identity.pem").read_bytes()
    path = str(folder / "site.toml")
    said = partners.call("site", "doctor", "--site", path, check=False).stdout
    steps = f"mv {folder}/state/membership.json {folder}/state/membership.json.old && "
    join = f"fedgraft site join site-02.kit --fingerprint ... --site {path}"
    assert "(fedgraft provision renew site-02)" in said
    assert steps + join in said
    home, kits = str(partners.home), str(partners.kits)
    partners.call("provision", "renew", "site-02", "--home", home, "-o", kits)
    (folder / "state" / "membership.json").rename(folder / "state" / "membership.json.old")
    kit = str(partners.kits / "site-02.kit")
    partners.call("site", "join", kit, "--fingerprint", partners.fingerprint, "--site", path)
    assert (folder / "state" / "identity.pem").read_bytes() == identity
    partners.until(lambda: doctor(partners, "site-02")[0] == 0)
