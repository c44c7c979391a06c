"""Spoken digits from their wav files to a report: six speakers as six sites, where the data is."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from fedgraft.common.config.jobfile import load_job
from fedgraft.common.console import Console
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "simulations" / "examples"
DATA = Path(os.environ.get("FEDGRAFT_DATA") or ROOT.parent / "shared") / "data" / "fsdd"
SPEAKERS = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not DATA.is_dir():
        pytest.skip("FEDGRAFT_DATA names no folder with data/fsdd")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "fsdd_sites", raising=False)
    from fsdd_sites import write_sites  # type: ignore[import-not-found]

    assert write_sites(DATA / "recordings", tmp_path / "sites") == SPEAKERS
    return tmp_path / "sites"


def overrides(sites: Path) -> tuple[str, ...]:
    return (
        f"simulation.train={sites}/*/train.csv",
        f"simulation.test={sites}/*/test.csv",
        "simulation.baselines=[]",
        "simulation.finetune_epochs=0",
    )


@pytest.mark.slow
def test_six_speakers_are_six_sites(sites: Path) -> None:
    prepared = prepare(load_job(EXAMPLES / "fsdd.toml", overrides(sites)))
    assert [site.name for site in prepared.sites] == SPEAKERS
    assert {(site.examples, site.test_examples) for site in prepared.sites} == {(450, 50)}
    assert prepared.skipped == 0


@pytest.mark.slow
def test_digits_of_six_speakers_are_learned(sites: Path, tmp_path: Path) -> None:
    job = load_job(EXAMPLES / "fsdd.toml", (*overrides(sites), "rounds.count=4"))
    with Run.create(tmp_path / "runs", job) as run:
        summary = simulate(prepare(job), run, Console(quiet=True), engine="local")
    assert summary["rounds"] == 4
    right = [site["federated"]["accuracy"] for site in summary["sites"]]
    assert np.mean(right) > 0.3  # a tenth is chance; docs/transfer/families.md has 76 % after 10


def test_what_is_read_is_what_the_file_says(sites: Path) -> None:
    path = (sites / "theo" / "test.csv").read_text().splitlines()[1].rpartition(",")[0]
    rate, samples = wavfile.read(path)
    assert rate == 8000 and samples.ndim == 1 and Path(path).name.startswith("0_theo_0")
