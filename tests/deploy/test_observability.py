"""Alerts and dashboard: right by Prometheus' own tool, and about figures that there are."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from support.programs import find, passes

FOLDER = Path(__file__).parents[2] / "deploy/observability"
SOURCE = "Debian's package prometheus"
FIGURES = {
    "fedgraft_bytes_total",
    "fedgraft_dropped_updates_total",
    "fedgraft_refused_requests_total",
    "fedgraft_restarts_total",
    "fedgraft_round",
    "fedgraft_round_seconds",
    "fedgraft_run_state",
    "fedgraft_site_last_seen_seconds",
    "fedgraft_sites",
}


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return read


def questions() -> list[str]:
    """What the dashboard asks Prometheus."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    read = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in read["groups"] for rule in group["rules"]]


def test_prometheus_takes_the_configuration_and_the_rules_it_names() -> None:
    said = passes([find("promtool", source=SOURCE), "check", "config", FOLDER / "prometheus.yml"])
    assert f"{len(alerts())} rules found" in said


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    promtool = find("promtool", source=SOURCE)
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    cases = shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    passes([promtool, "test", "rules", cases])


def test_every_alert_has_a_case() -> None:
    cases = Path(__file__).with_name("alerts_test.yml").read_text(encoding="utf-8")
    tried = set(re.findall(r"alertname: (\w+)", cases))
    assert {rule["alert"] for rule in alerts()} == tried


def test_the_dashboards_questions_are_ones_prometheus_understands(tmp_path: Path) -> None:
    promtool = find("promtool", source=SOURCE)
    rules = [
        {"record": f"asked:{at}", "expr": question.replace("$__rate_interval", "5m")}
        for at, question in enumerate(questions())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    passes([promtool, "check", "rules", path])


def test_all_of_them_are_about_figures_that_the_coordinator_gives() -> None:
    asked = " ".join([*questions(), *(rule["expr"] for rule in alerts())])
    assert set(re.findall(r"fedgraft_\w+", asked)) == FIGURES


def test_panels_do_not_lie_on_each_other() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24  # Grafana's columns
    assert len({panel["id"] for panel in panels}) == len(panels)
