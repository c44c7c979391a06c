"""The example jobs on the real data they are about, where it is."""

import os
from pathlib import Path

import pytest

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.jobfile import load_job
from fedgraft.simulations.preparation import prepare

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "simulations" / "examples"
DATA = Path(os.environ.get("FEDGRAFT_DATA") or ROOT.parent / "shared")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sites", "examples"),
    [
        ("trec", 10, 5_452),
        ("banking77", 10, 10_003),
        ("clinc150", 10, 15_000),
        ("pneumonia", 5, 3_882),
        ("amazon", 4, 6_400),
    ],
)
def test_an_example_fits_its_data(
    name: str, sites: int, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (DATA / "data").is_dir() or not (DATA / "models").is_dir():
        pytest.skip("FEDGRAFT_DATA names no folder with data/ and models/")
    monkeypatch.setenv("FEDGRAFT_DATA", str(DATA))
    job = load_job(EXAMPLES / f"{name}.toml")
    prepared = prepare(job)
    assert len(prepared.sites) == sites
    assert sum(site.examples for site in prepared.sites) == examples
    assert all(site.test_examples for site in prepared.sites)
    assert open_workbench(job).fresh_head  # no backbone here knows these labels
