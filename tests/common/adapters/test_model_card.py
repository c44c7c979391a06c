"""A card that hubs can read, and that says what is known and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.federations import digits_job, run_digits, write_digits

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.adapters.model_card import Origin, model_card
from fedgraft.common.config.job import Job

METRICS = {
    "accuracy": 0.8125, "accuracy_interval": [0.75, 0.86], "macro_f1": 0.79,
    "macro_f1_interval": [0.7, 0.84], "weighted_f1": 0.8, "balanced_accuracy": 0.78, "loss": 0.5,
}  # fmt: skip


def card(job: Job, **facts: Any) -> Any:
    origin = Origin("run-1", "2026-11-01T00:00:00", 3, **facts)
    return ModelCard(model_card(open_workbench(job), job, origin, form="peft"))


def test_its_metadata_is_what_a_hub_reads() -> None:
    found: Any = card(digits_job(), final={"federated": METRICS, "central": None}).data
    assert found.library_name == "peft" and found.pipeline_tag == "image-classification"
    assert "federated-learning" in found.tags
    assert found.license == "apache-2.0" and found.base_model is None  # it is on no hub
    results = {one.metric_name: one.metric_value for one in found.eval_results}
    assert results == {
        "accuracy": 0.8125,
        "macro F1": 0.79,
        "weighted F1": 0.8,
        "balanced accuracy": 0.78,
    }


def test_figures_come_with_their_intervals_and_the_other_models(tmp_path: Path) -> None:
    text = card(digits_job(), final={"federated": METRICS, "local_only": METRICS}, sites=4).text
    assert "| federated | 81.2 % (75.0 to 86.0) | 79.0 % (70.0 to 84.0) |" in text
    assert "| local only | 81.2 %" in text and "4 sites" in text


def test_without_a_test_set_it_has_the_last_validation() -> None:
    seen = {"accuracy": 0.5, "macro_f1": 0.4, "examples": 1234, "auroc": 0.75, "groups": None}
    found = card(digits_job(), validation=seen)
    assert "On 1,234 examples that the sites of the last round held out" in found.text
    assert "| 50.0 % | 40.0 % | 75.0 % |" in found.text
    assert "roc_auc" in {one.metric_type for one in found.data.eval_results}
    assert "Not in this folder" in card(digits_job()).text


def test_groups_and_what_was_not_measured_are_said() -> None:
    job = digits_job("data.group=sex", "data.groups=['f', 'm']")
    groups = {"f": {"examples": 40, "accuracy": 0.9}, "m": None}
    seen = METRICS | {"groups": groups, "accuracy_gap": None, "calibration_error": 0.1}
    text = card(job, final={"federated": seen}).text
    assert "| f | 40 | 90.0 % |" in text and "| m | fewer than 20 | not shown |" in text
    assert "other groups may be served worse" in text and "can be trusted" not in text
    plain = card(digits_job(), final={"federated": METRICS}).text
    assert "Whether its confidence can be trusted was not measured" in plain


def test_privacy_is_told_as_it_was() -> None:
    masked = card(digits_job("privacy.secure_aggregation.enabled=true")).text
    assert "(secure aggregation: a round withstands" in masked
    assert "in clear (no secure aggregation in this run)" in card(digits_job()).text


@pytest.mark.parametrize(
    ("written", "wanted"),
    [("license: apache-2.0", "apache-2.0"), ("license: My own terms", None), ("tags: [a]", None)],
)
def test_the_backbones_licence_is_passed_on_where_it_is_known(
    tmp_path: Path, written: str, wanted: str | None
) -> None:
    import shutil

    from fedgraft.common.backbones.load import BUILTIN

    folder = tmp_path / "backbone"
    shutil.copytree(BUILTIN / "glyph-vit", folder)
    (folder / "README.md").write_text(f"---\n{written}\n---\n# A model\n")
    found = card(digits_job(f"backbone.source=path:{folder}"))
    assert found.data.license == wanted
    if wanted or "own terms" in written:
        assert f"licence: {written.removeprefix('license: ')}" in found.text
    else:
        assert "licence: not known here" in found.text


@pytest.mark.parametrize("name", ["yes: no", "'quoted'", "a\nb", "{{ x }}", "---"])
def test_no_label_breaks_the_metadata(name: str) -> None:
    raw = digits_job().model_dump(mode="json", exclude_none=True)
    raw["job"]["labels"] = [name, *raw["job"]["labels"][1:]]
    found = card(Job.model_validate(raw), final={"federated": METRICS})
    assert found.data.pipeline_tag == "image-classification"


def test_every_export_of_a_run_has_one_with_its_figures_and_no_site(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 200, 60)
    run, summary = run_digits(tmp_path / "runs", *data, "simulation.baselines=['local_only']")
    found: Any = ModelCard.load(run.folder / "adapter" / "README.md")
    accuracy = summary["final"]["federated"]["accuracy"]
    results = {one.metric_name: one.metric_value for one in found.data.eval_results}
    assert results["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert f"{sum(site['examples'] for site in summary['sites']):,} of them in all" in found.text
    assert "Simulated" in found.text and "federating helped" in found.text
    assert not [site["name"] for site in summary["sites"] if site["name"] in found.text]
