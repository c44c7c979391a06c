"""Speaking roles of Shakespeare as sites, from the plays to perplexity, where the text is."""

import json
import os
import sys
from pathlib import Path

import pytest

from fedgraft.common.config.jobfile import load_job
from fedgraft.common.console import Console
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "simulations" / "examples"
DATA = Path(os.environ.get("FEDGRAFT_DATA") or ROOT.parent / "shared") / "data" / "tinyshakespeare"


def write_sites(folder: Path, monkeypatch: pytest.MonkeyPatch, sites: int) -> tuple[str, ...]:
    """The sites, and the overrides that make the example read them."""
    if not DATA.is_dir():
        pytest.skip("FEDGRAFT_DATA names no folder with data/tinyshakespeare")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "shakespeare_sites", raising=False)
    from shakespeare_sites import write_sites as write  # type: ignore[import-not-found]

    assert write(DATA, folder, sites)[:3] == ["GLOUCESTER", "DUKE VINCENTIO", "KING RICHARD II"]
    return (
        f"simulation.train={folder}/*/train.jsonl",
        f"simulation.test={folder}/*/test.jsonl",
        "simulation.baselines=['local_only']",
        "simulation.finetune_epochs=0",
    )


def test_a_role_is_a_site_and_what_it_says_last_is_for_testing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(
        load_job(EXAMPLES / "shakespeare.toml", write_sites(tmp_path, monkeypatch, 10))
    )
    assert len(prepared.sites) == 10 and prepared.sites[0].name == "coriolanus"
    plays = (DATA / "input.txt").read_text(encoding="utf-8")
    lines = [
        (tmp_path / "romeo" / f"{split}.jsonl").read_text().splitlines()
        for split in ("train", "test")
    ]
    speeches = [json.loads(line)["text"] for part in lines for line in part]
    places = [plays.index(f"ROMEO:\n{speech}") for speech in speeches if len(speech) > 60]
    assert places == sorted(places)
    assert len(lines[1]) == len(speeches) // 5


@pytest.mark.slow
def test_federating_lowers_perplexity_below_the_sites_own_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = write_sites(tmp_path / "sites", monkeypatch, 6)
    job = load_job(EXAMPLES / "shakespeare.toml", (*sites, "rounds.count=3"))
    with Run.create(tmp_path / "runs", job) as run:
        summary = simulate(prepare(job), run, Console(quiet=True))
    final, own = summary["final"], summary["sites"]
    assert final["federated"]["perplexity"] < 20  # 67 characters, equally likely: 67
    assert final["federated"]["perplexity"] < final["local_only"]["perplexity"]
    federated, alone = (
        sum(site[model]["perplexity"] for site in own) for model in ("federated", "local_only")
    )
    assert federated < alone  # also on each site's own test speeches, on average
