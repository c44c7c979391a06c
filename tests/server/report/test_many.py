"""A report of thousands of sites: short, of the right sites, and plain on what it leaves out."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.report_runs import (
    Record,
    assert_sound,
    make_round,
    make_run,
    make_site,
    metrics,
    visible,
    written,
)

from fedgraft.common.tasks import TASKS
from fedgraft.server.report.site_overview import MANY_SITES, QUANTILES, most_moved, spread

ACCURACY = TASKS["text-classification"].metrics[0]
REASONS = ("lost", "late", "not finite")


def many_sites(count: int) -> list[Record]:
    """Sites in no order, whose gains differ; most are unclear, some helped, fewer hurt."""
    draw = np.random.default_rng(count)
    sites = []
    for number in draw.permutation(count).tolist():
        ours, alone = (round(float(value), 6) for value in draw.uniform(0.1, 0.9, 2))
        gain = ours - alone
        outcome = "helped" if gain > 0.45 else "hurt" if gain < -0.55 else "unclear"
        sites.append(
            {**make_site(number, outcome), "federated": metrics(ours), "local_only": metrics(alone)}
        )
    return sites


def gain(site: Record) -> float:
    return float(site["federated"]["accuracy"] - site["local_only"]["accuracy"])


def many_run(sites: int, rounds: int, drops: int) -> tuple[Record, list[Record]]:
    summary, _ = make_run(rounds=1)
    summary["sites"] = many_sites(sites)
    dropped = [{"site": f"site-{at}", "reason": REASONS[at % 3]} for at in range(drops)]
    return summary, [make_round(at, dropped) for at in range(1, rounds + 1)]


def listed(page: str) -> list[str]:
    return re.findall(r'<th scope="row" class="name">(site-\d+)</th><td>800', page)


@pytest.mark.slow
def test_ten_thousand_sites_and_three_hundred_rounds_make_a_small_file(tmp_path: Path) -> None:
    summary, history = many_run(10_000, 300, 100)
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert len(page) < 500_000
    assert page.count("<tr>") < 350
    text = visible(page)
    counts = [sum(s["outcome"] == one for s in summary["sites"]) for one in ("helped", "hurt")]
    assert f"Federating helped {counts[0]:,} of 10,000 sites and hurt {counts[1]:,};" in text
    assert f"And {counts[1] - 8:,} more; the table of sites has those that lost most." in text
    assert "The table below has 40 of the 10,000 sites" in text
    assert "The other 9,960 are left out of this file; summary.json beside it has every" in text
    assert "Sites were dropped in 300 of 300 rounds." in text


@pytest.mark.usefixtures("words_only")
def test_the_sites_that_moved_most_are_the_ones_shown(tmp_path: Path) -> None:
    summary, history = many_run(300, 1, 0)
    ordered = sorted(summary["sites"], key=gain)
    lost, gained = ordered[:20], ordered[:-21:-1]
    page = written(tmp_path, summary, history)
    assert listed(page) == [site["name"] for site in (*gained, *lost)]
    told = page.split("<h3>Where federating hurt</h3>")[1].split("</ul>")[0]
    hurt = [site for site in ordered if site["outcome"] == "hurt"]
    assert re.findall(r"Verdict of (\d+)", told) == [site["name"][5:] for site in hurt[:8]]


def test_a_clear_verdict_goes_before_a_large_difference_that_may_be_chance() -> None:
    chance, clear, flat = make_site(1, "unclear"), make_site(2, "helped"), make_site(3, "unclear")
    chance["federated"], chance["local_only"] = metrics(1.0, 1), metrics(0.0, 1)
    flat["local_only"] = flat["federated"]
    unknown = {**make_site(4, "unknown"), "local_only": None}
    assert most_moved([chance, flat, unknown, clear], 9, ACCURACY) == ([clear, chance], [])
    assert most_moved([chance, flat, unknown, clear], 1, ACCURACY) == ([clear], [])
    hurt = {**clear, "federated": chance["local_only"], "outcome": "hurt"}
    assert most_moved([flat, hurt], 9, ACCURACY) == ([], [hurt])


@pytest.mark.parametrize("task", ["text-regression", "token-classification", "causal-lm"])
@pytest.mark.usefixtures("words_only")
def test_sites_are_ranked_by_the_headline_metric_of_the_task(task: str, tmp_path: Path) -> None:
    """Their accuracy says nothing here: it is the same for all, or was not measured."""
    metric = TASKS[task].metrics[0]
    summary, history = make_run(rounds=1)
    summary["job"]["task"] = task
    worse = -0.3 if metric.higher else 0.3
    summary["sites"] = [
        {
            **make_site(number, "hurt"),
            "federated": {metric.key: 0.5 + worse * (1 + number / 1000)},
            "local_only": {metric.key: 0.5},
        }
        for number in range(120)
    ]
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert listed(page) == [f"site-{number}" for number in range(119, 99, -1)]
    text = visible(page)
    assert "No site can be picked out" not in text
    assert "And 112 more; the table of sites has those that lost most." in text


@pytest.mark.usefixtures("words_only")
def test_hurt_sites_without_figures_are_told_of_and_no_table_is_promised(tmp_path: Path) -> None:
    summary, history = make_run(rounds=1)
    summary["sites"] = [
        {**make_site(number, "hurt"), "federated": None, "local_only": None}
        for number in range(120)
    ]
    text = visible(written(tmp_path, summary, history))
    assert "Verdict of 0. Verdict of 1." in text and "And 112 more in summary.json" in text


@pytest.mark.parametrize(("sites", "rows"), [(MANY_SITES, MANY_SITES), (MANY_SITES + 1, 40)])
@pytest.mark.usefixtures("words_only")
def test_up_to_the_bound_every_site_has_its_row(tmp_path: Path, sites: int, rows: int) -> None:
    summary, history = many_run(sites, 1, 0)
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert len(listed(page)) == rows
    assert ("left out of this file" in visible(page)) == (rows < sites)
    assert ("How accuracy on the sites' own" in page) == (rows < sites)


@pytest.mark.usefixtures("words_only")
def test_verdicts_shown_add_up_to_all_sites(tmp_path: Path) -> None:
    summary, history = many_run(1500, 1, 0)
    summary["sites"][7]["outcome"] = "splendid"
    page = visible(written(tmp_path, summary, history)).split("Verdicts ")[1]
    shown = re.findall(r"(?:helped|hurt|unclear|not compared) ([\d,]+) \([\d.]+ %\)", page)
    assert len(shown) == 4
    assert sum(int(count.replace(",", "")) for count in shown) == 1500


@pytest.mark.usefixtures("words_only")
def test_quantiles_are_those_of_all_sites(tmp_path: Path) -> None:
    summary, history = many_run(777, 1, 0)
    summary["sites"][5]["local_only"] = None
    for model, count in (("federated", 777), ("local_only", 776)):
        values = [site[model]["accuracy"] for site in summary["sites"] if site[model]]
        found = spread(summary["sites"], model, "accuracy")
        assert found is not None and found.sites == count
        wanted = np.quantile(values, list(QUANTILES.values()))
        assert found.quantiles == pytest.approx(wanted, abs=1e-12)
        assert found.mean == pytest.approx(np.mean(values))
    shown = " ".join(f"{100 * value:.1f} %" for value in (*wanted, np.mean(values)))
    assert f"Local only {shown} 776" in visible(written(tmp_path, summary, history))


def test_a_model_that_was_measured_nowhere_has_no_quantiles() -> None:
    assert spread([{"federated": None}, {}], "federated", "accuracy") is None
    single = spread([make_site(1)], "federated", "accuracy")
    assert single is not None and set(single.quantiles) == {0.9}


@pytest.mark.parametrize(("rounds", "rows", "step"), [(100, 100, 1), (101, 51, 2), (1000, 100, 10)])
@pytest.mark.usefixtures("words_only")
def test_of_many_rounds_some_are_shown_and_always_the_last(
    tmp_path: Path, rounds: int, rows: int, step: int
) -> None:
    page = written(tmp_path, *many_run(3, rounds, 0))
    table = page.split("hold out of training")[1].split("</table>")[0]
    shown = [int(at.replace(",", "")) for at in re.findall(r'<th scope="row">([\d,]+)', table)]
    assert len(shown) == rows and shown[0] == step and shown[-1] == rounds
    assert ("metrics.jsonl" in table) == (step > 1)


@pytest.mark.usefixtures("words_only")
def test_of_many_drops_all_are_counted_and_the_last_are_named(tmp_path: Path) -> None:
    page = written(tmp_path, *many_run(3, 7, 50))
    section = page.split("<h3>Dropped sites</h3>")[1].split("</section>")[0]
    assert "350 replies were not used" in section
    counts = re.findall(r'class="words">(.*?)</th><td>(\d+)</td>', section)
    assert {reason for reason, _ in counts} == set(REASONS)
    assert sum(int(count) for _, count in counts) == 350
    names = re.findall(r'<tr><td>(\d)</td><th scope="row" class="name">(site-\d+)', section)
    assert names == [(at, f"site-{site}") for at in "67" for site in range(50)]
    assert "Below are the last 100" in section


@pytest.mark.usefixtures("words_only")
def test_reasons_that_all_differ_do_not_make_a_long_table(tmp_path: Path) -> None:
    summary, history = make_run(rounds=1)
    history[0]["dropped"] = [{"site": "a", "reason": f"reason {at}"} for at in range(500)]
    text = visible(written(tmp_path, summary, history))
    assert "any other reason 480" in text


def test_many_sites_of_which_nothing_is_known_still_give_a_report(tmp_path: Path) -> None:
    sites: list[dict[str, Any]] = [{"name": f"site-{at}"} for at in range(150)]
    page = written(tmp_path, {"sites": sites}, [])
    assert_sound(page)
    assert "all 150 are left out of this file" in visible(page)
    assert not listed(page)


def test_hundreds_of_sites_are_dots_and_thousands_are_squares(tmp_path: Path) -> None:
    dots = written(tmp_path, *many_run(400, 1, 0))
    assert "One dot per site (400 of 400 have both values)" in visible(dots)
    assert "summary.json has them" in visible(dots)
    summary, history = many_run(401, 1, 0)
    above = sum(gain(site) > 0 for site in summary["sites"])
    squares = visible(written(tmp_path, summary, history))
    assert f"{above} sites are above it, {401 - above} below." in squares
    assert "One dot per site" not in squares
