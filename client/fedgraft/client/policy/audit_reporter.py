"""Report the head of this site's audit to the coordinator, so that its past cannot be rewritten.

Reports are sent from a separate thread. A round does not wait for them, and a coordinator that does
not answer costs only a warning. If rounds take longer than ``EVERY``, each round is reported. If
they are faster, the newest head is reported, which vouches for all lines before it. The last head
of a run is always reported.
"""

import logging
import threading
from pathlib import Path

from fedgraft.client.membership.credentials import Membership, ask, open_member_channel
from fedgraft.client.membership.state_files import AUDIT
from fedgraft.common.errors import FedgraftError
from fedgraft.common.federation.audit_log import Audit, AuditHead
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = ["AuditReporter", "report_audit_head"]

log = logging.getLogger("fedgraft.client")

EVERY = 10.0  # seconds between two reports, each of which is a line in the coordinator's audit
AGAIN = 60.0  # seconds between a failed try and the next one
LAST = 5.0  # seconds that a stopping site waits for its last report


def report_audit_head(
    member: Membership, state: Path, known: AuditHead | None = None
) -> AuditHead | None:
    """Report the current head to the coordinator, unless it is ``known`` there; return the head.

    Raises:
        FedgraftError: the audit cannot be read, or the coordinator cannot be reached or refuses.
    """
    head, facts = Audit(state / AUDIT).newest
    if not head.lines or head == known:
        return known
    request = pb.HeadRequest(
        run=str(facts.get("run", "")),
        round=int(facts.get("round", 0)),
        lines=head.lines,
        head=head.hash,
    )
    with open_member_channel(state, member.endpoint) as channel:
        ask(services.MembershipStub(channel).ReportHead, request)
    return head


class AuditReporter:
    """Reports the head some time after each ``wake``; ``every`` and ``again`` are in seconds."""

    def __init__(
        self, member: Membership, state: Path, *, every: float = EVERY, again: float = AGAIN
    ) -> None:
        self._member, self._state = member, state
        self._every, self._again = every, again
        self._known: AuditHead | None = None
        self._news, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit head", daemon=True)

    def wake(self) -> None:
        """Start a report, because the audit has grown."""
        self._news.set()
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def close(self) -> None:
        """Report the newest head once more, if that is quick."""
        self._stop.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join(LAST)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            self._news.wait()
            stopping = self._stop.is_set()
            self._news.clear()
            pause = self._every if self._report() else self._again
            self._stop.wait(pause)

    def _report(self) -> bool:
        try:
            self._known = report_audit_head(self._member, self._state, self._known)
        except FedgraftError as error:
            log.warning("the head of the audit was not reported: %s; %s", error, error.hint)
        except Exception as error:  # rounds go on after any error
            log.warning("the head of the audit was not reported: %s", type(error).__name__)
        else:
            return True
        self._news.set()  # the head still has to be reported
        return False
