"""Comparisons cannot cost a run its result, and say what they are."""

from pathlib import Path

import pytest
from support.federations import digits_job, run_digits, write_digits

from fedgraft.common.console import Console
from fedgraft.common.errors import RunError
from fedgraft.common.methods import HeadMethod
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import inputs_of, prepare
from fedgraft.simulations.simulate import simulate

ALL = "simulation.baselines=['zero_shot', 'head_only', 'local_only', 'central']"


@pytest.mark.slow
def test_a_central_model_that_diverges_is_not_run_and_the_rest_stands(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 60, 30)
    diverging = "simulation.central={learning_rate=1e30, batch_size=1}"
    run, summary = run_digits(tmp_path, *data, "rounds.count=1", ALL, diverging)
    assert summary["final"]["central"] is None
    assert summary["final"]["federated"]["accuracy"] > 0
    assert all(site["central"] is None for site in summary["sites"])
    assert (run.folder / "adapter" / "adapter_config.json").exists()


def test_the_pooled_set_is_the_sites_sets_together(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 90, 60)
    _, summary = run_digits(tmp_path, *data, "rounds.count=1", ALL, "simulation.finetune_epochs=1")
    for model in ("federated", "central", "head_only", "zero_shot"):
        right = sum(s[model]["accuracy"] * s["test_examples"] for s in summary["sites"])
        total = sum(s["test_examples"] for s in summary["sites"])
        assert summary["final"][model]["accuracy"] == pytest.approx(right / total)
    assert summary["final"]["local_only"]["best_accuracy"] <= 1
    assert all("After a short fine-tune" in site["verdict"] for site in summary["sites"])


def test_head_only_is_not_compared_with_itself(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 60, 30)
    job = digits_job(*data, "rounds.count=1", "simulation.baselines=['head_only']")
    job = job.model_copy(update={"method": HeadMethod(kind="head")})
    with Run.create(tmp_path / "runs", job) as run:
        summary = simulate(prepare(job), run, Console(quiet=True))
    assert summary["final"]["head_only"] is None


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 60, 30)
    job = digits_job(*data)
    began = inputs_of(job, prepare(job), "local")
    run = Run.create(tmp_path / "runs", job, began)
    run.expect(inputs_of(job, prepare(job), "local"))
    next((tmp_path / "digits" / "train").glob("*/*.png")).unlink()
    with pytest.raises(RunError, match="its data changed"):
        run.expect(inputs_of(job, prepare(job), "local"))
    with pytest.raises(RunError, match="engine"):
        run.expect({**began, "engine": "ray"})
