"""What is read of runs while they grow, are cut back, and are done again."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedgraft.server.jobs.progress import SHOWN, Overview, Round, RunFigures, pace
from fedgraft.server.jobs.queue import Jobs, Submitted


def line(number: int, **more: Any) -> str:
    facts = {"round": number, "bytes_up": 10, "bytes_down": 100, "seconds": 2.0, "dropped": []}
    return json.dumps(facts | more) + "\n"


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def cut(path: Path, *lines: str) -> None:
    """As a run does it that goes on: a new file in the place of the old one."""
    new = path.with_suffix(".new")
    write(new, *lines)
    new.replace(path)


class Place:
    """Jobs and runs of a coordinator, and a look at them."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.jobs, self.runs = Jobs(folder / "jobs"), folder / "runs"
        for name in names:
            self.jobs.put(Submitted(name, state="running"))
            (self.jobs.folder / f"{name}.toml").write_text("[rounds]\ncount = 5\n")

    def metrics(self, name: str) -> Path:
        return self.runs / name / "metrics.jsonl"

    def look(self) -> Overview:
        return Overview(self.jobs, self.runs)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, "r1")


def test_a_run_as_it_grows(place: Place) -> None:
    overview = place.look()
    (before,) = overview.lines()
    assert (before["rounds"], before["of"], before["seconds"], before["left"]) == (0, 5, None, None)
    write(place.metrics("r1"), line(1), line(2, seconds=4.0)[:-5])
    assert overview.lines()[0]["rounds"] == 1  # the second is not whole yet
    write(place.metrics("r1"), line(2, seconds=4.0)[-5:])
    dropped = [{"site": "a", "reason": "deadline"}, {"site": "b", "reason": "deadline"}]
    write(place.metrics("r1"), line(3, seconds=9.0, dropped=dropped))
    (now,) = overview.lines()
    assert now == {
        "run": "r1", "state": "running", "why": "", "rounds": 3, "of": 5, "bytes_up": 30,
        "bytes_down": 300, "dropped": 2, "reasons": {"deadline": 2}, "seconds": 9.0, "left": 8.0,
        "warnings": [],
    }  # fmt: skip
    assert overview.totals() == {"bytes": {"up": 30, "down": 300}, "dropped": {"deadline": 2}}


def test_rounds_that_are_done_again_count_in_the_totals_and_once_in_the_run(place: Place) -> None:
    overview = place.look()
    write(place.metrics("r1"), line(1), line(2), line(3))
    overview.lines()
    cut(place.metrics("r1"), line(1), line(2))
    assert overview.lines()[0]["rounds"] == 2
    write(place.metrics("r1"), line(3, seconds=2.5))
    assert overview.lines()[0]["rounds"] == 3
    assert overview.totals()["bytes"] == {"up": 40, "down": 400}


def test_what_was_there_before_the_start_is_not_in_the_totals(place: Place) -> None:
    write(place.metrics("r1"), line(1, dropped=[{"site": "a", "reason": "deadline"}]))
    overview = place.look()
    assert overview.lines()[0]["bytes_up"] == 10
    assert overview.totals() == {"bytes": {"up": 0, "down": 0}, "dropped": {}}
    write(place.metrics("r1"), line(2))
    overview.lines()
    assert overview.totals()["bytes"] == {"up": 10, "down": 100}


@pytest.mark.parametrize(
    "bad",
    [
        "\n",
        "{}\n",
        "no\n",
        "[1]\n",
        line(1, seconds="x"),
        line(1, dropped=[1]),
        "[" * 99_999 + "\n",
    ],
)
def test_lines_that_are_none_are_passed_over(place: Place, bad: str) -> None:
    write(place.metrics("r1"), bad, line(2))
    assert place.look().lines()[0]["rounds"] == 1


def test_reasons_without_end_are_counted_as_others(place: Place) -> None:
    overview = place.look()
    drops = [{"site": "a", "reason": f"reason-{number}"} for number in range(200)]
    write(place.metrics("r1"), line(1, dropped=drops))
    (shown,) = overview.lines()
    assert shown["dropped"] == 200
    assert len(shown["reasons"]) == 50
    counted = overview.totals()["dropped"]
    assert len(counted) == 51
    assert sum(counted.values()) == 200
    assert counted["other"] == 150


def test_the_last_warnings_in_words(place: Place) -> None:
    events = place.runs / "r1" / "events.jsonl"
    write(events, *('{"event":"round"}\n' for _ in range(9000)))
    for number in range(7):
        sites = [{"site": f"s{at}", "reason": "gone"} for at in range(20 if number == 6 else 0)]
        facts = {"time": f"2027-01-15T08:00:0{number}.123+00:00", "event": "warning"}
        write(events, json.dumps(facts | {"what": f"waiting {number}", "sites": sites}) + "\n")
    figures = RunFigures(place.runs / "r1")
    figures.read()
    assert len(figures.warnings) == 5
    assert figures.warnings[0] == "2027-01-15T08:00:02 waiting 2"
    assert figures.warnings[-1].startswith("2027-01-15T08:00:06 waiting 6: s0 (gone), s1 (gone)")
    assert figures.warnings[-1].endswith("s9 (gone)")


def test_only_the_newest_runs_are_shown(tmp_path: Path) -> None:
    names = [f"r{number:03}" for number in range(SHOWN + 5)]
    lines = Place(tmp_path, *names).look().lines()
    assert [each["run"] for each in lines] == names[-SHOWN:]


def test_a_job_that_does_not_say_how_many_rounds(place: Place) -> None:
    (place.jobs.folder / "r1.toml").write_text("")
    write(place.metrics("r1"), line(1))
    (shown,) = place.look().lines()
    assert (shown["of"], shown["left"]) == (None, None)


def test_one_slow_round_does_not_change_the_pace() -> None:
    rounds = [
        Round(number, 0, 0, seconds, ()) for number, seconds in enumerate([9, 9, 2, 2, 90, 2])
    ]
    assert pace(rounds) == 2
