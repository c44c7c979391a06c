"""The jobs that were proposed to this site, its decision on each, and the bytes sent for each.

Each session has one file in ``state/approvals``. An agreement covers one job and the tensors that
it exchanges. Anything else in the same session needs a new agreement.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedgraft.common.errors import InputError, RunError, SiteFailure
from fedgraft.common.files import write_text

__all__ = ["Agreement", "Agreements", "hash_plan"]

Status = Literal["pending", "agreed", "approved", "denied"]
MOST_PENDING = 100  # a coordinator must not fill a disk with proposals


@dataclass(frozen=True)
class Agreement:
    """The decision on one proposal.

    The policy alone decides ``agreed``; a person decides ``approved`` and ``denied``. ``plan`` is
    ``hash_plan`` of the job and its tensors, ``job`` is the job's JSON, and ``leaving`` is the
    ``Disclosure`` as JSON. ``backbone`` is the fingerprint of the backbone that was here then; it
    is empty in the files of earlier versions.
    """

    session: str
    plan: str
    status: Status
    asked: float
    job: str
    leaving: dict[str, Any]
    backbone: str = ""

    def binds(self, plan: str | None, *, ask: bool) -> bool:
        """Return whether the site takes part in ``plan``; None means the plan of this agreement.

        With ``ask``, only a person's approval counts.
        """
        said = self.status == "approved" or (self.status == "agreed" and not ask)
        return said and plan in (None, self.plan)


def hash_plan(job: str, names: Sequence[str]) -> str:
    """Return SHA-256 (hex) over a job, as JSON, and the names of the tensors that it exchanges."""
    return hashlib.sha256(json.dumps([job, *names]).encode()).hexdigest()


class Agreements:
    """The proposals in ``folder``; a session is 32 hex digits, which the caller has checked."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock

    def find(self, session: str) -> Agreement | None:
        """Return the decision on the session's proposal; None if there was no proposal.

        Raises:
            RunError: the file is damaged.
        """
        path = self.folder / f"{session}.json"
        if not path.exists():
            return None
        try:
            return Agreement(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise RunError(f"{path} is damaged", hint="remove it: the job is then new") from None

    def pending(self) -> list[Agreement]:
        """Return the proposals that wait for a person, the oldest first."""
        return [each for each in self._all() if each.status == "pending"]

    def newest(self) -> Agreement | None:
        """Return the last proposal that nobody denied; None if there is none."""
        return next((each for each in reversed(self._all()) if each.status != "denied"), None)

    def _all(self) -> list[Agreement]:
        found = [self.find(path.stem) for path in self.folder.glob("[0-9a-f]*.json")]
        return sorted((each for each in found if each), key=lambda each: each.asked)

    def propose(
        self,
        session: str,
        job: str,
        names: Sequence[str],
        leaving: dict[str, Any],
        *,
        backbone: str,
        ask: bool,
    ) -> None:
        """Agree to a job, or with ``ask`` let a person decide.

        Another ``backbone`` (its fingerprint) is another proposal.

        Raises:
            SiteFailure: ``approval-pending`` or ``approval-denied``.
        """
        plan, known = hash_plan(job, names), self.find(session)
        if known is None or known.plan != plan or known.backbone not in ("", backbone):
            known = Agreement(session, plan, "pending", self._clock(), job, leaving, backbone)
            if not ask:
                known = replace(known, status="agreed")
            if ask and len(self.pending()) >= MOST_PENDING:
                raise SiteFailure("approval-pending", "too many jobs wait for approval")
            self._keep(known)
        elif known.status == "pending" and not ask:  # the policy no longer asks
            self._keep(replace(known, status="agreed"))
            return
        if known.status == "denied":
            raise SiteFailure("approval-denied")
        if not known.binds(plan, ask=ask):
            if known.status == "agreed":  # the policy did not ask then, but asks now
                self._keep(replace(known, status="pending"))
            raise SiteFailure("approval-pending")

    def decide(self, agreement: Agreement, *, approve: bool) -> None:
        """Record a person's decision on the proposal as it was shown."""
        self._keep(replace(agreement, status="approved" if approve else "denied"))

    def named(self, prefix: str) -> Agreement:
        """Return the one proposal whose session begins with ``prefix``.

        Raises:
            InputError: no session begins with it, or several do.
        """
        paths = sorted(self.folder.glob("[0-9a-f]*.json"))
        found = [path.stem for path in paths if path.stem.startswith(prefix)]
        agreement = self.find(found[0]) if len(found) == 1 else None
        if agreement is None:
            many = f"{len(found)} jobs begin with {prefix}" if found else f"no job {prefix}"
            raise InputError(many, hint="fedgraft site approve lists those that wait")
        return agreement

    def spend(self, session: str, number: int, size: int, *, most: int) -> None:
        """Count bytes that are about to leave in a round; they stay counted if they do not leave.

        Raises:
            SiteFailure: ``policy-bytes``: more than ``most`` bytes would leave in this round.
        """
        path = self.folder / f"{session}.bytes"
        spent: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        total = spent.get(str(number), 0) + size
        if total > most:
            raise SiteFailure("policy-bytes")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(path, json.dumps(spent | {str(number): total}))

    def _keep(self, agreement: Agreement) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(self.folder / f"{agreement.session}.json", json.dumps(asdict(agreement)))
