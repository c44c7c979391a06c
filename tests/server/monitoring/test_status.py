"""How things stand, in words."""

import pytest
from support.standings import NOW, make_status

from fedgraft.server.monitoring.status import (
    NEVER,
    alarms,
    process_rows,
    refused_rows,
    run_rows,
    site_rows,
)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (None, NEVER),
        (NOW, "0 s ago"),
        (NOW + 5, "0 s ago"),  # a clock that was put right
        (NOW - 59.4, "59 s ago"),
        (NOW - 60, "1 min 0 s ago"),
        (NOW - 7260, "2 h 1 min ago"),
        (NOW - 86_400, "2027-01-14 08:00 UTC"),
    ],
)
def test_how_long_ago(then: float | None, words: str) -> None:
    facts = make_status()
    facts["sites"][0]["last_seen"] = then
    assert site_rows(facts)[0]["seen"] == words


def test_the_head_of_a_sites_audit() -> None:
    rows = {row["site"]: row["audit"] for row in site_rows(make_status())}
    assert rows == {
        "hospital-a": "line 1,204, round 4 of r2",
        "hospital-b": "line 7, round 4 of r2, CUT",
        "hospital-c": "not told",
        "hospital-d": "not told",
    }


def test_runs_newest_first_with_what_there_is_to_say() -> None:
    newest, oldest = run_rows(make_status())
    assert (newest["run"], newest["round"], newest["done"]) == ("r2", "4 of 10", 0.4)
    assert newest["told"][0] == "dropped updates: not-finite (1), deadline (2)"
    assert newest["told"][1].startswith("warning: 2027-01-15T07:59:00 waiting")
    assert (oldest["round"], oldest["done"], oldest["told"]) == ("0 of ?", 0.0, [])


def test_who_was_refused() -> None:
    assert [row["site"] for row in refused_rows(make_status())] == [
        "hospital-a",
        "somebody as hospital-d",
        "a stranger",
    ]


def test_processes() -> None:
    facts = make_status()
    facts["processes"] = {"front": {"pid": 0, "starts": 0}, "executor": {"pid": 7, "starts": 3}}
    assert process_rows(facts) == [
        {"name": "front", "state": "DOWN", "restarts": "0"},
        {"name": "executor", "state": "runs, process 7", "restarts": "2"},
    ]


def test_alarms() -> None:
    facts = make_status(second_sessions={"hospital-a": NOW - 300})
    facts["processes"]["front"]["pid"] = 0
    down, cut, second = alarms(facts)
    assert "logs/front.log" in down
    assert cut.startswith("hospital-b had told 1,100 lines")
    assert second.startswith("hospital-a runs twice, or somebody else has its key")
    facts["sites"][1]["audit"]["lost"] = 0
    facts["processes"]["front"]["pid"] = 5
    assert alarms(facts | {"second_sessions": {}}) == []


def test_what_others_say_cannot_write_to_a_terminal() -> None:
    nasty = "\x1b[2J\r\n\u202eevil" + "x" * 1000
    facts = make_status(second_sessions={nasty: NOW})
    facts["sites"][1]["site"] = facts["sites"][1]["audit"]["run"] = nasty
    facts["runs"][1] |= {"run": nasty, "why": nasty, "reasons": {nasty: 1}, "warnings": [nasty]}
    facts["refused"][0] |= {"site": nasty, "path": nasty}
    said = str([alarms(facts), site_rows(facts), run_rows(facts), refused_rows(facts)])
    assert "?[2J???evil" in said
    assert all(char.isprintable() for char in said)
    assert "\\x" not in said
    assert len(said) < 20_000
