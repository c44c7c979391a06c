"""The passage on faults comes out of every summary, and only of a run that had some."""

from pathlib import Path
from typing import Any

import pytest

from fedgraft.server.report.page import write_report

FAULTS: dict[str, Any] = {
    "dropout": 0.25,
    "stragglers": 0.2,
    "delay": 600.0,
    "poisoned": 0.1,
    "poison": "labels",
    "slow_sites": ["north", "<b>south</b>"],
    "poisoned_sites": ["east"],
    "waits": [{"round": 2, "seconds": 90.0}],
    "waited": 90.0,
    "longest_wait": {"round": 2, "seconds": 90.0},
}


def page(folder: Path, faults: object) -> str:
    text = write_report(folder, {"faults": faults}, []).read_text("utf-8")
    return text.replace("\u00a0", " ")


def test_it_names_sites_and_what_waiting_would_have_cost(tmp_path: Path) -> None:
    text = page(tmp_path, FAULTS)
    assert "this was a rehearsal" in text and 'id="faults"' in text
    assert "25.0 % of rounds" in text
    assert "north, &lt;b&gt;south&lt;/b&gt;, late by 10 min 0 s on average" in text
    assert "east (labels)" in text
    assert "1 min 30 s in all rounds, at most 1 min 30 s in one (round 2)" in text


@pytest.mark.parametrize("faults", [None, {}, "all", 3, ["dropout"]])
def test_a_run_without_faults_has_no_such_passage(tmp_path: Path, faults: object) -> None:
    assert "aults on purpose" not in page(tmp_path, faults)


@pytest.mark.parametrize("key", list(FAULTS))
@pytest.mark.parametrize("junk", [None, "x", -1, [], [1], {"a": 1}])
def test_what_was_not_recorded_well_does_not_cost_the_report(
    tmp_path: Path, key: str, junk: object
) -> None:
    assert "Faults on purpose" in page(tmp_path, FAULTS | {key: junk})
    without = {name: value for name, value in FAULTS.items() if name != key}
    assert "Faults on purpose" in page(tmp_path, without)
