"""The coordinator's status in words: the rows that the terminal and the page show.

``facts`` is the result of ``Coordinator.status``. Some of its texts come from sites and from
strangers at the public port. Therefore characters that are not printable are replaced here; the
terminal and the page each escape the rest.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fedgraft.server.report.values import as_duration, as_size

__all__ = ["NEVER", "alarms", "down", "process_rows", "refused_rows", "run_rows", "site_rows"]

Facts = Mapping[str, Any]
Row = dict[str, str]
NEVER = "never"
LONGEST = 400


def down(facts: Facts) -> list[str]:
    """Return the names of the processes that do not run."""
    return [name for name, each in facts["processes"].items() if not each["pid"]]


def alarms(facts: Facts) -> list[str]:
    """Return the texts of the alarms, which a person must look at now."""
    found = [
        f"{name} is down: it is started again by itself; if it stays so, logs/{name}.log says why"
        for name in down(facts)
    ]
    for site in facts["sites"]:
        if lost := site["audit"]["lost"]:
            found.append(
                f"{_plain(site['site'])} had told {lost:,} lines of its audit, and then fewer or "
                "others: it was cut or changed there"
            )
    for site, then in facts["second_sessions"].items():
        found.append(
            f"{_plain(site)} runs twice, or somebody else has its key: a second session was "
            f"refused {_ago(facts['time'], then)} and the first goes on"
        )
    return found


def process_rows(facts: Facts) -> list[Row]:
    """Return name, state and restarts of each process."""
    return [
        {
            "name": name,
            "state": f"runs, process {each['pid']}" if each["pid"] else "DOWN",
            "restarts": str(max(each["starts"] - 1, 0)),
        }
        for name, each in facts["processes"].items()
    ]


def site_rows(facts: Facts) -> list[Row]:
    """Return name, state, connection, last-seen time and last audit head of each site."""
    return [
        {
            "site": _plain(each["site"]),
            "state": each["state"],
            "connected": "yes" if each["connected"] else "no",
            "seen": _ago(facts["time"], each["last_seen"]),
            "audit": _audit(each["audit"]),
        }
        for each in facts["sites"]
    ]


def _audit(head: Facts) -> str:
    """Return the position of a site's audit, by the last head that the site reported."""
    if not head["head"]:
        return "not told"
    cut = ", CUT" if head["lost"] else ""
    return f"line {head['lines']:,}, round {head['round']} of {_plain(head['run'])}{cut}"


def run_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return the facts of each run, newest first; ``told`` are separate lines of text."""
    return [_run(each) for each in reversed(facts["runs"])]


def _run(each: Facts) -> dict[str, Any]:
    reasons = [f"{_plain(reason)} ({count})" for reason, count in each["reasons"].items()]
    dropped = [f"dropped updates: {', '.join(reasons)}"] if reasons else []
    return {
        "run": _plain(each["run"]),
        "state": each["state"],
        "round": f"{each['rounds']} of {each['of'] or '?'}",
        "done": each["rounds"] / each["of"] if each["of"] else 0.0,
        "seconds": as_duration(each["seconds"]),
        "left": as_duration(each["left"]),
        "up": as_size(each["bytes_up"]),
        "down": as_size(each["bytes_down"]),
        "dropped": str(each["dropped"]),
        "why": _plain(each["why"]),
        "told": dropped + [f"warning: {_plain(text)}" for text in each["warnings"]],
    }


def refused_rows(facts: Facts) -> list[Row]:
    """Return the last requests that were refused at the public port, newest first."""
    return [
        {
            "site": _claim(each),
            "status": str(each["status"]),
            "path": _plain(each["path"]),
            "count": f"{each['count']:,}",
            "when": _ago(facts["time"], each["time"]),
        }
        for each in reversed(facts["refused"])
    ]


def _claim(each: Facts) -> str:
    """Return the name of the refused client; without a valid certificate it is only a claim."""
    name = _plain(each["site"])
    if not name:
        return "a stranger"
    return name if each["certificate"] == "SUCCESS" else f"somebody as {name}"


def _ago(now: float, then: float | None) -> str:
    """Return how long ago ``then`` was, or the time (UTC) if it is more than a day ago."""
    if then is None:
        return NEVER
    seconds = max(now - then, 0.0)
    if seconds >= 86_400:
        return f"{datetime.fromtimestamp(then, UTC):%Y-%m-%d %H:%M} UTC"
    return f"{seconds:.0f} s ago" if seconds < 60 else f"{as_duration(seconds)} ago"


def _plain(text: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(text)[:LONGEST])
