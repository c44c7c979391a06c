"""What a simulation prints at its end: ten sites one by one, thousands in a few lines."""

import re
from typing import Any

import numpy as np
import pytest
from support.report_runs import make_run, metrics

from fedgraft.common.console import Console
from fedgraft.simulations.cli.simulate import MANY_SITES, _show


def shown(sites: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, Any]:
    outcomes = [("helped", "hurt", "unclear", "unclear")[number % 4] for number in range(sites)]
    summary, _ = make_run(outcomes)
    draw = np.random.default_rng(sites)
    for number, site in enumerate(summary["sites"]):
        site.update(federated=metrics(float(draw.uniform())), local_only=None)
        if number % 2:
            site["local_only"] = metrics(float(draw.uniform()))
    _show(Console(), summary)
    return capsys.readouterr().out, summary


def test_few_sites_have_a_row_and_a_sentence_each(capsys: pytest.CaptureFixture[str]) -> None:
    text, summary = shown(MANY_SITES, capsys)
    for site in summary["sites"]:
        assert re.search(rf"^ ?{site['name']} +800 ", text, re.MULTILINE)
        assert site["verdict"] in text
    assert "median" not in text


def test_many_sites_are_quantiles_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    text, summary = shown(1200, capsys)
    assert len(text.splitlines()) < 25
    assert "site-7" not in text and "Verdict of" not in text
    for model, name in (("federated", "fed."), ("local_only", "local")):
        values = [100 * site[model]["accuracy"] for site in summary["sites"] if site[model]]
        points = [*np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]), np.mean(values)]
        row = next(line for line in text.splitlines() if line.split()[:1] == [name])
        pooled = 100 * summary["final"][model]["accuracy"]
        wanted = [*(f"{point:.1f}" for point in points), f"{len(values):,}", f"{pooled:.1f}"]
        assert row.split()[1:] == wanted
    assert "Federating helped 300 of 1,200 sites and hurt 300; for 600 the test" in text
    assert "every site: runs/run-1/summary.json" in text


def test_json_is_not_mixed_with_either(capsys: pytest.CaptureFixture[str]) -> None:
    for sites in (3, 40):
        _show(Console(as_json=True), make_run(("helped",) * sites)[0])
    assert capsys.readouterr().out == ""
