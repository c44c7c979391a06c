"""A federation with sites that have no labels: who takes part, what travels, what is exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from support.federations import adapter_of, digits_job, run_digits, write_digits
from support.matrix import thinned
from transformers import AutoModelForImageClassification

from fedgraft.client.data.rows import read_split
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.errors import DataError, InputError, JobError
from fedgraft.common.examples import IGNORED
from fedgraft.common.layout import DOMAIN
from fedgraft.server.export.adapter import export_adapter
from fedgraft.server.plan import make_plan
from fedgraft.simulations.preparation import prepare

UNLABELLED = "simulation.unlabelled=['site-02']"
MASKED = "privacy.secure_aggregation.enabled=true"


def adapting(how: str, *more: str) -> tuple[str, ...]:
    return (UNLABELLED, f"training.domain={{kind='{how}'}}", "rounds.count=2", *more)


def slots(run: Any) -> dict[str, Any]:
    """What travelled beside the adapter, as it was after the last round."""
    bench = open_workbench(run.job)
    layout, adapter = make_plan(run.job, bench, run.session).exchanged, adapter_of(run)
    return {n: adapter[at] for n, at in layout.slices.items() if n.startswith(DOMAIN)}


@pytest.mark.slow
def test_a_site_without_labels_stays_away_where_nothing_adapts(tmp_path: Path) -> None:
    beside = ("rounds.count=1", "simulation.baselines=['local_only','central']")
    run, summary = run_digits(tmp_path, UNLABELLED, *beside)
    assert [one["sites"] for one in run.history()] == [2]
    site = next(one for one in summary["sites"] if one["name"] == "site-02")
    assert site["federated"]["accuracy"] > 0 and site["local_only"] is None
    others = [one for one in summary["sites"] if one["name"] != "site-02"]
    assert all(one["local_only"] for one in others)
    assert summary["final"]["central"]["accuracy"] > 0


@pytest.mark.parametrize("how", thinned(["coral", "mmd", "dann"], 3))
def test_it_takes_part_where_a_job_adapts(how: str, tmp_path: Path) -> None:
    run, _ = run_digits(tmp_path, *adapting(how))
    assert [one["sites"] for one in run.history()] == [3, 3]
    beside = slots(run)
    assert all(np.isfinite(value).all() and value.any() for value in beside.values())
    if how == "dann":
        return
    # What a slot has is the mean over all sites' examples, zeros of the other group among them.
    seen = {group: float(beside[f"{DOMAIN}{group}.seen"][0]) for group in ("source", "target")}
    assert sum(seen.values()) == pytest.approx(SCALE, rel=1e-5)
    assert 0.2 < seen["target"] / SCALE < 0.5  # a third of the sites


@pytest.mark.slow
def test_masked_it_is_the_same(tmp_path: Path) -> None:
    clear, _ = run_digits(tmp_path, *adapting("mmd", "rounds.count=1"))
    masked, _ = run_digits(tmp_path, *adapting("mmd", "rounds.count=1", MASKED))
    bound = masked.history()[0]["masked"]["error_bound"]
    for name, value in slots(clear).items():
        np.testing.assert_allclose(slots(masked)[name], value, rtol=0, atol=bound + 1e-7)


@pytest.mark.slow
def test_an_export_has_nothing_but_the_adapter(tmp_path: Path) -> None:
    run, _ = run_digits(tmp_path / "runs", *adapting("mmd"))
    bench = open_workbench(run.job)
    plan = make_plan(run.job, bench, run.session)
    export_adapter(run, bench, plan.exchanged, adapter_of(run), tmp_path / "peft")
    bench.put()
    plain = AutoModelForImageClassification.from_pretrained(bench.backbone.folder)
    names = dict(PeftModel.from_pretrained(plain, tmp_path / "peft").named_parameters())
    assert set(plan.exchanged.of_model.names) <= set(names)
    assert not any(DOMAIN in name for name in names)
    adapter = adapter_of(run)
    for name, where in plan.exchanged.of_model.slices.items():
        np.testing.assert_array_equal(names[name].detach().numpy().reshape(-1), adapter[where])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("method.kind=head",), "leaves all features as they are"),
        (("aggregation.rule=median",), "plain mean"),
        (("aggregation.server_optimizer.kind=adam",), "plain mean"),
        (("aggregation.server_optimizer.learning_rate=0.5",), "plain mean"),
        ((MASKED, "privacy.secure_aggregation.clip=0.05"), "clip is 0.05"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(JobError, match=why):
        digits_job(*adapting("coral", *overrides))


def test_a_site_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no site site-2"):
        prepare(digits_job("simulation.unlabelled=['site-2']"))


# Files without labels


def test_rows_without_labels_need_no_column(tmp_path: Path) -> None:
    job = digits_job("job.task=text-classification")
    table = tmp_path / "a.jsonl"
    table.write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = read_split(str(table), job, labelled=False).dataset
    assert rows["label"][:] == [IGNORED] * 2 and rows["text"][:] == ["one", "two"]
    with pytest.raises(DataError, match="no column 'label'"):
        read_split(str(table), job)


def test_images_without_labels_lie_anywhere(tmp_path: Path) -> None:
    write_digits(tmp_path, 6, 1)
    (tmp_path / "train" / "7.png").write_bytes(next(tmp_path.glob("train/*/*.png")).read_bytes())
    rows = read_split(str(tmp_path / "train"), digits_job(), labelled=False).dataset
    assert rows["label"][:] == [IGNORED] * 7
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no files"):
        read_split(str(tmp_path / "none"), digits_job(), labelled=False)
