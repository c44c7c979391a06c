"""Why this site refused a request, for its own people: in the log, in ``site status``, in doctor.

Only a code leaves the site. Our own errors say what is wrong, where, and what to do; none of them
has the text of a row, except a label of a few characters. The text of any other error may hold
anything, so only its class and its place in the code are told.
"""

import json
import os
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedgraft.common.errors import FedgraftError, SiteFailure
from fedgraft.common.files import write_text
from fedgraft.common.secagg.errors import SecAggError

__all__ = ["KEPT", "Reason", "explain", "keep_reason", "last_reasons"]

FILE = "reasons.jsonl"
KEPT = 50  # the newest reasons; older ones are forgotten
LONGEST = 2000  # characters


@dataclass(frozen=True)
class Reason:
    """A refusal: when (UTC), of which message and run, the ``code`` that left, and why."""

    at: str
    stage: str
    session: str
    code: str
    why: str
    hint: str


def explain(error: Exception) -> tuple[str, str]:
    """Return why a request was refused, and what to do; both may be empty."""
    if isinstance(error, SiteFailure) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)
    if isinstance(error, FedgraftError | SecAggError):
        told = str(error)
        return ("" if isinstance(error, SiteFailure) and told == error.code else told), error.hint
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{place}", "the log has the whole way to it"


def keep_reason(state: Path, stage: str, session: str, code: str, error: Exception) -> None:
    """Add the reason for a refusal to the newest ones in ``state``, which its owner alone reads.

    A disk that is full costs the reason, and nothing else.
    """
    why, hint = (text[:LONGEST] for text in explain(error))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        new = Reason(now, stage, session, code, why, hint)
        # A site that waits for approval is asked again every few seconds: that is one reason.
        earlier = [
            one for one in last_reasons(state, KEPT) if asdict(one) | {"at": now} != asdict(new)
        ]
        reasons = [*earlier[1 - KEPT :], new]
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = (json.dumps(asdict(one), ensure_ascii=True) + "\n" for one in reasons)
        write_text(state / FILE, "".join(lines))
        os.chmod(state / FILE, 0o600)
    except OSError:
        return


def last_reasons(state: Path, count: int) -> list[Reason]:
    """Return the newest reasons, at most ``count``, the newest last; lines that broke are left."""
    found = []
    try:
        lines = (state / FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            told = Reason(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if all(isinstance(value, str) for value in asdict(told).values()):
            found.append(told)
    return found[-count:] if count else []
