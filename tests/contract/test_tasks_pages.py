"""What people are shown of a run of any task: a report, a model card, and a site's own report."""

import copy
import html
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from support.contract import Federation, check_figures, unfilled
from support.contract_tasks import TaskCase

from fedgraft.client.results.report import read_report
from fedgraft.client.results.report import write_report as write_site_report
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.tasks import TASKS
from fedgraft.server.report.page import write_report
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


def words_only() -> AbstractContextManager[Any]:
    """Draw no figure: each takes a fifth of a second."""
    return patch("fedgraft.server.report.plots.render", lambda *_: "<svg></svg>")


def changed(federation: Federation, folder: Path, change: Callable[[Any], None]) -> str:
    """The report of the simulated run after ``change`` of its summary."""
    run = federation.simulated
    summary = copy.deepcopy(run.summary() or {})
    change(summary)
    written = write_report(folder, summary, run.history())
    page = html.unescape(written.read_text(encoding="utf-8"))
    assert not unfilled(page)
    return page


def test_of_many_sites_a_report_has_those_that_lost_most(
    federation: Federation, tmp_path: Path
) -> None:
    metric = federation.job.task.metrics[0]
    worse = -1 if metric.higher else 1

    def change(summary: Any) -> None:
        one = summary["sites"][0]
        summary["sites"] = [
            {
                **one,
                "name": f"site-{number}",
                "outcome": "hurt",
                "verdict": f"Verdict of {number}.",
                "federated": {**one["federated"], metric.key: 0.5 + worse * (1 + number) / 500},
                "local_only": {**one["local_only"], metric.key: 0.5},
            }
            for number in range(120)
        ]

    with words_only():
        page = changed(federation, tmp_path, change)
    told = page.partition("Where federating hurt")[2].partition("</ul>")[0]
    most = [str(number) for number in range(119, 99, -1)]
    assert re.findall(r"Verdict of (\d+)", told) == most[:8]
    assert "And 112 more; the <a" in told
    assert "No site can be picked out" not in page and "Gained most" not in page
    table = page.partition("Lost most")[2].partition("</table>")[0]
    assert re.findall(r'class="name">site-(\d+)<', table) == most


def test_a_report_shows_a_small_difference_and_a_share_below_0(
    federation: Federation, tmp_path: Path
) -> None:
    metric, share = federation.job.task.metrics[0], federation.job.task.share

    def change(summary: Any) -> None:
        final = summary["final"]
        final["federated"] |= {share.key: -0.4, f"{share.key}_interval": [-0.6, -0.2]}
        final["federated"][metric.key] = 0.101
        final["local_only"][metric.key] = 0.104
        for site in summary["sites"]:
            site["federated"] |= {share.key: -0.4, f"{share.key}_interval": [-0.6, -0.2]}

    # Figures are drawn for one task of those that draw the same share.
    drawn = federation.job.task is next(one for one in TASKS.values() if one.share == share)
    with nullcontext() if drawn else words_only():
        page = changed(federation, tmp_path, change)
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', page)
    ours, theirs = (metric.text(value, unit="\u00a0%") for value in (0.101, 0.104))
    assert ours in lead and theirs in lead
    assert ("(the same)" in lead) == (ours == theirs)
    assert ("right for" in lead) == metric.right and (metric.right or f"has {metric.name}" in lead)
    assert "-40.0\u00a0%" in page
    axis = re.search(r">-[1-9][0-9.]*</text>", page)
    assert axis or not drawn, "the axis ends at 0"


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


def test_a_site_is_shown_only_what_there_is(federation: Federation, tmp_path: Path) -> None:
    """Without an interval, no words stand in its place; a curve that is all below 0 is none."""
    share = federation.job.task.share
    report: dict[str, Any] = read_report(federation.reported) or {}
    for model in report["models"].values():
        for key in [key for key in model or {} if key.endswith("_interval")]:
            del model[key]
    for line in report["rounds"]:
        line[share.key] = -0.5
    write_site_report(tmp_path, report)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "(not measured)" not in page and "()" not in page and "95 %: ;" not in page
    assert "<svg" not in page and share.text(-0.5) in page


def test_bars_of_a_sites_page_stay_in_their_boxes(federation: Federation) -> None:
    """A share may be below zero; a bar of it has no length."""
    page = (federation.reported / "report.html").read_text(encoding="utf-8")
    body = page.partition("<body>")[2]
    drawn = [float(one) for one in re.findall(r"(?:width|left|right): (-?[\d.]+)%", body)]
    assert len(drawn) >= 3
    outside = [one for one in drawn if not 0 <= one <= 100]
    assert not outside
