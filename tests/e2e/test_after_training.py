"""After training on real data: X-rays with F1 and AUROC per site, a real encoder as ONNX.

Where FEDGRAFT_DATA has the data; elsewhere these are skipped.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.federations import adapter_of

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.jobfile import load_job
from fedgraft.common.console import Console
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "simulations" / "examples"
DATA = Path(os.environ.get("FEDGRAFT_DATA") or ROOT.parent / "shared")
THERE = (DATA / "data/pneumonia").is_dir() and (DATA / "models/all-MiniLM-L6-v2").is_dir()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not THERE, reason="FEDGRAFT_DATA names no folder with data/ and models/"),
]


def run_example(
    name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> tuple[Run, dict[str, Any]]:
    monkeypatch.setenv("FEDGRAFT_DATA", str(DATA))
    job = load_job(EXAMPLES / f"{name}.toml", overrides)
    prepared = prepare(job)
    with Run.create(runs, job) as run:
        return run, simulate(prepared, run, Console(quiet=True))


def test_x_rays_have_f1_and_auroc_per_site_beside_central_and_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, summary = run_example(
        "pneumonia",
        tmp_path,
        monkeypatch,
        "rounds.count=3",
        "simulation.baselines=['local_only', 'central']",
    )
    final = summary["final"]
    for model in ("federated", "central", "local_only"):
        assert final[model]["auroc"] > 0.7
    # Alone, a site with nearly one label diverges; its scores are all in one bin.
    assert max(final[model]["auroc_error"] for model in ("federated", "central")) < 0.05
    several = 0
    for site in summary["sites"]:
        judged = site["comparisons"]["local_only"]
        assert judged["outcome"] == site["outcome"] and judged["sentence"] in site["verdict"]
        gap = site["federated"]["macro_f1"] - site["local_only"]["macro_f1"]
        assert judged["macro_f1_difference"] == pytest.approx(gap)
        low, high = judged["macro_f1_difference_interval"]
        assert -1 <= low <= high <= 1
        several += all(site[one]["auroc"] is not None for one in ("federated", "central"))
    assert several >= 3  # a site whose test set has one label has none
    assert summary["moved"] and "cosine" in summary["site_map"]
    page = (run.folder / "report.html").read_text("utf-8")
    assert "AUROC" in page and "Map of 5 sites" in page


def test_a_real_encoder_runs_as_onnx_with_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    import torch

    from fedgraft.server.export.onnx import example_inputs, export_onnx

    run, _ = run_example(
        "trec",
        tmp_path,
        monkeypatch,
        "rounds.count=1",
        "simulation.baselines=[]",
        "simulation.finetune_epochs=0",
        "rounds.cohort=5",
    )
    bench = open_workbench(run.job)
    plan = make_plan(run.job, bench, run.session)
    export_onnx(run, bench, plan.exchanged, adapter_of(run), tmp_path / "out")
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    inputs = example_inputs(bench, run.job, 3, 30)
    bench.put((plan.exchanged, adapter_of(run)))
    with torch.inference_mode():
        wanted = bench.model(**inputs).logits.numpy()
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(found, wanted, atol=1e-3)
