"""The report's pages on ranking, groups, what moved, and the map of the sites."""

from pathlib import Path

import pytest
from support.report_runs import (
    assert_sound,
    make_run,
    make_site,
    measured,
    metrics,
    visible,
    with_insights,
    written,
)


@pytest.mark.usefixtures("words_only")
def test_what_was_counted_is_shown_with_what_it_can_be_off_by(tmp_path: Path) -> None:
    summary, history = make_run()
    summary = with_insights(summary)
    page = written(tmp_path, summary, history)
    assert_sound(page)
    told = visible(page)
    assert "95.0 % ± 0.4 %" in told and "3.1 % ± 0.5 %" in told
    assert "AUROC is the share of pairs" in told
    assert "90.0 % of 90" in told and "too few" in told and "1.2 %" in told
    assert "site-1 Federated 80.0 % of 90" in told


@pytest.mark.usefixtures("words_only")
def test_a_run_that_counted_nothing_has_no_such_page(tmp_path: Path) -> None:
    told = visible(written(tmp_path, *make_run()))
    assert "Ranking, calibration" not in told and "AUROC" not in told


def test_modules_are_listed_by_how_far_they_moved(tmp_path: Path) -> None:
    summary, history = make_run()
    summary["moved"] = [
        {"module": f"layers.{n}.query", "change": 1.0, "relative": n / 100, "low_rank": True}
        for n in range(30)
    ]
    page = written(tmp_path, summary, history)
    assert_sound(page)
    told = visible(page)
    assert told.index("layers.29.query") < told.index("layers.3.query")
    assert "the 24 that moved most of 30" in told
    assert "layers.5.query" not in page.split("Every module in numbers")[0].split("<svg")[-1]


def test_the_map_comes_with_its_numbers_or_with_why_not(tmp_path: Path) -> None:
    summary, history = make_run()
    summary = with_insights(summary)
    page = written(tmp_path, summary, history)
    assert "Map of 3 sites" in page and "-0.25" in visible(page) and "87.5 %" in visible(page)
    summary["site_map"] = {"absent": "two sites make no map"}
    told = visible(written(tmp_path, summary, history))
    assert "No map of the sites' directions: two sites make no map." in told


@pytest.mark.parametrize(
    "broken",
    [
        {"sites": ["a", "b"], "places": [[0, 1]], "cosine": [[1, 0], [0, 1]]},
        {"sites": ["a", "b"], "places": [[0, 1], [1, None]], "cosine": [[1, 0], [0, 1]]},
        {"sites": ["a", "b"], "places": [[0, 1], [1, 0]], "cosine": [[1, 0]]},
        {"sites": "ab", "places": 3, "cosine": None},
    ],
)
@pytest.mark.usefixtures("words_only")
def test_half_a_map_is_none(tmp_path: Path, broken: dict[str, object]) -> None:
    summary, history = make_run()
    summary["site_map"] = broken
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert "Map of" not in page


def test_hundreds_of_sites_have_no_row_each(tmp_path: Path) -> None:
    summary, history = make_run()
    summary["sites"] = [make_site(number) for number in range(150)]
    for site in summary["sites"]:
        site["federated"] = metrics(0.9) | measured(0.8)
    summary["final"]["federated"] |= measured(0.9)
    told = visible(written(tmp_path, summary, history))
    assert "all sites Federated 90.0 %" in told and "site-77 Federated" not in told


@pytest.mark.usefixtures("words_only")
def test_every_difference_has_its_interval(tmp_path: Path) -> None:
    summary, history = make_run(("helped", "hurt"))
    summary["sites"][1]["comparisons"] = {
        "local_only": {
            "outcome": "hurt", "difference": -0.125, "interval": [-0.2, -0.04], "p_value": 0.0123,
            "macro_f1_difference": -0.0001, "macro_f1_difference_interval": [-0.11, 0.02],
        },
        "zero_shot": {"outcome": "helped", "difference": 0.3, "interval": [0.2, 0.4]},
    }  # fmt: skip
    page = written(tmp_path, summary, history)
    assert_sound(page)
    told = visible(page)
    assert "site-2 Local only -12.5 -20.0 to -4.0 0.012 0.0 -11.0 to +2.0 ▼ hurt" in told
    assert "site-2 Zero-shot +30.0 +20.0 to +40.0 \N{EN DASH} \N{EN DASH} ▲ helped" in told
