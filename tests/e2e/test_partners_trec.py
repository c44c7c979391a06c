"""Three partner sites with a real encoder and real questions; what is killed comes back.

MiniLM (22.7 M parameters) on shards of TREC, where FEDGRAFT_DATA has them. The coordinator hands
the backbone out to two sites, the third imports a copy by hand.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.partners import NGINX, Partners
from e2e.test_partners import run_here
from support.federations import adapter_of

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import load_job
from fedgraft.common.federation.audit_log import verify
from fedgraft.server.runs.run_folder import Run

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FEDGRAFT_DATA") or ROOT.parent / "shared")
TRAIN, TEST = 720, 240
THERE = (DATA / "data" / "trec").is_dir() and (DATA / "models" / "all-MiniLM-L6-v2").is_dir()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
    pytest.mark.skipif(not THERE, reason="FEDGRAFT_DATA names no folder with TREC and MiniLM"),
]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("FEDGRAFT_DATA", str(DATA))
    rows = tmp_path / "trec"
    rows.mkdir()
    for name, count in (("train", TRAIN), ("test", TEST)):
        lines = (DATA / "data" / "trec" / f"{name}.jsonl").read_text().splitlines()
        (rows / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    overrides = (
        f"simulation.train={rows / 'train.jsonl'}",
        f"simulation.test={rows / 'test.jsonl'}",
        *("simulation.sites=3", "simulation.partition={kind='dirichlet', alpha=1.0}"),
        *("rounds.count=8", "rounds.min_sites=3", "rounds.deadline='300s'"),
        *("data.max_length=32", "training.learning_rate=2e-3"),
    )
    return load_job(ROOT / "simulations" / "examples" / "trec.toml", overrides)


@pytest.fixture
def partners(tmp_path_factory: pytest.TempPathFactory, job: Job) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("t")  # short: it holds sockets
    with Partners(folder, job) as running:
        running.join_all()
        model = str(DATA / "models" / "all-MiniLM-L6-v2")
        running.call("fetch", model, "--site", str(folder / "site-00" / "site.toml"))
        running.start_sites()
        yield running


def test_killed_at_both_ends_the_adapter_is_that_of_the_simulation_and_every_site_holds_it(
    partners: Partners, job: Job, tmp_path: Path
) -> None:
    run = partners.submit(job)
    partners.until(lambda: len(partners.rounds(run)) >= 1)
    partners.kill("site-01")
    partners.kill("coordinator")
    partners.start_coordinator()
    partners.start_sites(["site-01"])
    partners.until(lambda: partners.state(run) == "finished")
    there = Run(partners.home / "runs" / run)
    assert [line["round"] for line in there.history()] == list(range(1, job.rounds.count + 1))
    assert [line["sites"] for line in there.history()] == [3] * job.rounds.count

    (tmp_path / "state").mkdir()
    truth = run_here(partners, job, tmp_path)
    np.testing.assert_allclose(adapter_of(there), adapter_of(truth), rtol=0, atol=1e-5)

    fetched = {name: partners.read(f"{name}.log").count("backbone: ") for name in partners.data}
    assert fetched["site-00"] == 0  # it was imported
    assert fetched["site-02"] >= 1
    results = {name: partners.folder / name / "state" / "results" / run for name in partners.data}
    for name, result in results.items():
        config = json.loads((result / "adapter" / "adapter_config.json").read_text())
        named, _, digest = config["base_model_name_or_path"].partition(" ")
        assert named == "path:all-MiniLM-L6-v2" and digest.startswith("sha256:")
        verify(partners.folder / name / "state" / "audit.jsonl")
    site = str(partners.folder / "site-00" / "site.toml")
    partners.end("site-00")  # idle, it measures by itself, and one process at a time may
    said = partners.call("site", "results", run, "--measure", "--json", "--site", site)
    models = json.loads(said.stdout)["models"]
    assert models["zero_shot"] is None  # its head does not know these labels
    assert models["federated"]["accuracy"] > 0.5
    assert models["local_only"] is not None
