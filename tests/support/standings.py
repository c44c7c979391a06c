"""A status of a coordinator as tests of the page, the figures and the terminal want it."""

from copy import deepcopy
from typing import Any

__all__ = ["NOW", "Facts", "make_status"]

Facts = dict[str, Any]
NOW = 1_800_000_000.0
NO_AUDIT = {"lines": 0, "head": "", "run": "", "round": 0, "time": None, "lost": 0}
AUDIT = {"lines": 1204, "head": "ab" * 32, "run": "r2", "round": 4, "time": NOW - 60, "lost": 0}
STATUS: Facts = {
    "time": NOW,
    "listen": "0.0.0.0:8443",
    "processes": {
        "superlink": {"pid": 11, "starts": 1},
        "executor": {"pid": 12, "starts": 3},
        "front": {"pid": 13, "starts": 1},
    },
    "sites": [
        {"site": "hospital-a", "state": "joined", "connected": True, "last_seen": NOW - 12,
         "audit": AUDIT},
        {"site": "hospital-b", "state": "joined", "connected": False, "last_seen": NOW - 4000,
         "audit": {**AUDIT, "lines": 7, "lost": 1100}},
        {"site": "hospital-c", "state": "invited", "connected": False, "last_seen": None,
         "audit": NO_AUDIT},
        {"site": "hospital-d", "state": "revoked", "connected": False,
         "last_seen": NOW - 200_000, "audit": NO_AUDIT},
    ],
    "runs": [
        {"run": "r1", "state": "failed", "why": "it failed too often", "rounds": 0, "of": None,
         "bytes_up": 0, "bytes_down": 0, "dropped": 0, "reasons": {}, "seconds": None,
         "left": None, "warnings": []},
        {"run": "r2", "state": "running", "why": "", "rounds": 4, "of": 10,
         "bytes_up": 3_000_000, "bytes_down": 4_500_000, "dropped": 3,
         "reasons": {"not-finite": 1, "deadline": 2}, "seconds": 61.0, "left": 366.0,
         "warnings": ["2027-01-15T07:59:00 waiting for 3 sites: hospital-b (site-unreachable)"]},
    ],
    "refused": [
        {"time": NOW - 500, "site": "", "status": 404, "path": "/docs", "certificate": "NONE",
         "count": 1},
        {"time": NOW - 90, "site": "hospital-d", "status": 400, "path": "/v1/fleet/pull-messages",
         "certificate": "FAILED:certificate revoked", "count": 1200},
        {"time": NOW - 70, "site": "hospital-a", "status": 412,
         "path": "/v1/fleet/activate-node", "certificate": "SUCCESS", "count": 9},
    ],
    "second_sessions": {},
    "totals": {
        "bytes": {"up": 3_000_000, "down": 4_500_000},
        "dropped": {"not-finite": 1, "deadline": 2},
        "refused": {"404": 1, "400": 1200, "412": 9},
        "restarts": {"superlink": 0, "executor": 2, "front": 0},
    },
}  # fmt: skip


def make_status(**changes: Any) -> Facts:
    """The status, and what is different in it."""
    return {**deepcopy(STATUS), **changes}
