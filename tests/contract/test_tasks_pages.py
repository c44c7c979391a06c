"""What people are shown of a run of any task: a report, a model card, and a site's own report."""

import html
import re
from typing import Any

import pytest
from support.contract import Federation, check_figures, unfilled
from support.contract_tasks import TaskCase

from fedgraft.client.results.report import read_report
from fedgraft.common.metrics.metric import Metric
from fedgraft.server.report.values import as_share


def shown(metric: Metric, figures: dict[str, Any]) -> str:
    """A figure as the report writes it."""
    return metric.text(figures[metric.key], unit="\u00a0%")


def test_what_a_task_shows_has_a_share_and_words(case: TaskCase) -> None:
    task = case.task
    assert task.share.percent and task.share in task.metrics
    assert len({metric.key for metric in task.metrics}) == len(task.metrics) == 2
    for metric in (*task.metrics, *task.card_metrics):
        assert metric.key.isidentifier() and metric.name
    for text in (task.examples, task.person, task.intervals, task.verdicts, task.use):
        assert text
    assert task.person == task.modality.several
    assert not task.card_note or task.card_note.endswith(". ")
    assert len(task.differences.heads) in (2, 3) and task.differences.caption


@pytest.mark.parametrize("partners", [False, True], ids=["simulated", "partners"])
def test_a_report_shows_the_metrics(federation: Federation, partners: bool) -> None:
    run = federation.handed_over if partners else federation.simulated
    page = html.unescape((run.folder / "report.html").read_text(encoding="utf-8"))
    assert not unfilled(page)
    task, lines = federation.job.task, page.splitlines()
    assert task.intervals in page and task.verdicts in page
    for metric in task.metrics:
        assert f"Validation {metric.name}" in page, metric
        for line in run.history():
            start = f'<tr><th scope="row">{line["round"]}</th>'
            (row,) = (one for one in lines if one.startswith(start))
            assert f"<td>{shown(metric, line['validation'])}</td>" in row, metric
    if not partners:
        final = (run.summary() or {})["final"]["federated"]
        (at,) = (n for n, one in enumerate(lines) if "trained by all sites together" in one)
        for metric in task.metrics:
            assert f"<td>{shown(metric, final)}</td>" in lines[at + 1], metric


def test_a_report_has_the_best_site_alone(federation: Federation) -> None:
    task, run = federation.job.task, federation.simulated
    if not task.metrics[0].percent:
        return
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    best = (run.summary() or {})["final"]["local_only"][f"best_{task.share.key}"]
    row = next(line for line in page.splitlines() if "Local only, best site" in line)
    assert f"<td>{as_share(best)}</td>" in row


def test_a_model_card_has_what_was_measured(federation: Federation) -> None:
    run, task = federation.simulated, federation.job.task
    card = (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert not unfilled(card)
    final = (run.summary() or {})["final"]["federated"]
    measured = [metric for metric in task.card_metrics if final.get(metric.key) is not None]
    assert measured
    for metric in measured:
        assert f" {metric.name} |" in card and metric.text(final[metric.key]) in card, metric
    assert task.card_note in card and federation.job.method.describe() in card
    assert f"- {task.metrics[0].title} differs between sites" in card
    calibrated = "calibration_error" in {metric.key for metric in task.card_metrics}
    assert ("Whether its confidence" in card) == calibrated
    for words in (task.use, f"pipeline_tag: {task.pipeline}", task.auto_class, task.examples):
        assert words in card


def test_a_site_is_told_what_it_was_worth(federation: Federation) -> None:
    folder, task = federation.reported, federation.job.task
    found = read_report(folder)
    assert found is not None
    check_figures(task.metrics, found["models"]["federated"])
    assert found["comparisons"].keys() == {"local_only", "zero_shot"}
    for name in ("report.html", "report.md"):
        text = html.unescape((folder / name).read_text(encoding="utf-8"))
        assert not unfilled(text), name
        assert found["verdict"] in text
        for metric in task.metrics:
            figure = metric.text(found["models"]["federated"][metric.key])
            assert metric.name in text and figure in text, metric


def test_a_site_is_told_the_share_of_every_round(federation: Federation) -> None:
    share = federation.job.task.share
    lines = (federation.reported / "report.md").read_text(encoding="utf-8").splitlines()
    assert f"| round | sites | training loss | validation {share.name} |" in lines
    for line in federation.handed_over.history():
        wanted = f"| {share.text(line['validation'][share.key])} |"
        row = next(row for row in lines if row.startswith(f"| {line['round']} |"))
        assert row.endswith(wanted), row
    kept = read_report(federation.reported) or {}
    assert all(line.keys() == {"round", "sites", share.key, "loss"} for line in kept["rounds"])


def test_bars_of_a_sites_page_stay_in_their_boxes(federation: Federation) -> None:
    """A share may be below zero; a bar of it has no length."""
    page = (federation.reported / "report.html").read_text(encoding="utf-8")
    body = page.partition("<body>")[2]
    drawn = [float(one) for one in re.findall(r"(?:width|left|right): (-?[\d.]+)%", body)]
    assert len(drawn) >= 3
    outside = [one for one in drawn if not 0 <= one <= 100]
    assert not outside
