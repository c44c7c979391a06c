"""Replies that nobody was asked for reach the audit once, and others do not."""

import json
from pathlib import Path
from typing import Any

from fedgraft.server.coordinator.forged_replies import ForgedReplies


def append(path: Path, *lines: dict[str, Any], end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("\n".join(map(json.dumps, lines)) + end)


def test_what_is_forged_is_told_once(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "events.jsonl"
    forged = {"event": "dropped", "round": 2, "site": "a", "reason": "bad-seal"}
    append(path, forged)  # before the coordinator started

    forgeries = ForgedReplies(tmp_path, lambda kind, **facts: told.append({"event": kind, **facts}))
    forgeries.tend("run")
    forgeries.tend("other")
    assert told == []

    late = {"event": "dropped", "round": 3, "site": "a", "reason": "deadline"}
    again = {"event": "dropped", "round": 3, "site": "b", "reason": "evaluation: wrong-round"}
    invited = {"event": "warning", "what": "", "sites": [{"site": "c", "reason": "bad-seal"}]}
    append(path, late, end="")
    path.write_bytes(path.read_bytes()[:-9] + b"\n")  # torn by a crash
    append(path, late, again, invited, {"event": "round", "round": 3, "sites": 1})
    append(path, forged, end="")  # being written
    forgeries.tend("run")
    append(path, end="\n")
    forgeries.tend("run")
    forgeries.tend("run")
    assert [tuple(one.values()) for one in told] == [
        ("reply-refused", "run", 3, "b", "wrong-round"),
        ("reply-refused", "run", 0, "c", "bad-seal"),
        ("reply-refused", "run", 2, "a", "bad-seal"),
    ]
