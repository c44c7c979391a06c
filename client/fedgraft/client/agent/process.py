"""The site as a process: ask the coordinator for work, let the installed code do it, reply.

One process runs as long as the site takes part, so that the model stays on its device between
rounds. It runs the ``fedgraft`` that is installed here, and no code that came over the network. The
coordinator gets a reply, or the class of an error, never the error's text.
"""

import logging
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedgraft.client.agent.superlink_session import (
    MessageExpired,
    ReceivedMessage,
    Refused,
    SessionAlive,
    SessionError,
    SessionUnknown,
    SuperLinkSession,
    Unreachable,
)
from fedgraft.client.app import app
from fedgraft.common.messages.signatures import seal

__all__ = ["Agent", "Chores", "PollInterval", "make_tls"]

log = logging.getLogger("fedgraft.client")

RUNS = 4  # runs whose state is kept in memory
SOON, LATER = 1.0, 60.0  # seconds before the coordinator is tried again
PATIENCE = 5  # failures that are normal, because a coordinator that just started knows no site
STILL_THERE = 5.0  # seconds between tries while the last session of a killed site is alive
PAUSES: dict[type[SessionError], float] = {
    SessionAlive: STILL_THERE,
    SessionUnknown: SOON,
    Refused: LATER,
}


@dataclass(frozen=True)
class PollInterval:
    """Seconds between two requests for work: ``brisk`` up to ``during`` after a message."""

    brisk: float = 0.05
    idle: float = 4.0  # with heartbeats, less than one request in three seconds
    during: float = 15.0

    def pause(self, since: float) -> float:
        """Return the seconds to wait if the last message was ``since`` seconds ago."""
        return self.brisk if since < self.during else self.idle


class Chores:
    """The tasks of a site beside its messages; by default there are none."""

    def came(self) -> None:
        """Run after a message has come and before it is answered."""

    def answered(self) -> None:
        """Run after the reply has left."""

    def idle(self) -> bool:
        """Run if there is no message; return whether the certificate was renewed."""
        return False

    def close(self) -> None:
        """Run when the site stops."""


@dataclass
class Agent:
    """The process of a site: it takes messages from a coordinator and answers them.

    ``participant.open_participant`` reads ``node_config``. ``sign`` signs with the site's identity.
    ``tls`` makes a context with the current certificate. ``chores`` run between messages.
    """

    site: str
    endpoint: str
    key: EllipticCurvePrivateKey
    sign: Callable[[bytes], bytes]
    node_config: Mapping[str, str]
    tls: Callable[[], ssl.SSLContext | None]
    chores: Chores = field(default_factory=Chores)
    poll_interval: PollInterval = PollInterval()
    contexts: dict[int, Context] = field(default_factory=dict)
    stopping: bool = False

    def run(self) -> None:
        """Work until ``stopping``; after a connection error, connect again."""
        try:
            self._keep_working()
        finally:
            self.chores.close()

    def _keep_working(self) -> None:
        failures = 0
        while not self.stopping:
            try:
                with SuperLinkSession(self.endpoint, self.tls(), self.key) as session:
                    log.info("joined as %s", self.site)
                    failures = 0
                    self._work(session)
            except SessionError as error:
                failures += 1
                self._wait(_explain(error, failures, self.endpoint))

    def _work(self, session: SuperLinkSession) -> None:
        """Take and answer messages; return after the certificate was renewed, or on ``stopping``.

        Raises:
            SessionError: the session cannot go on.
        """
        last = time.monotonic() - self.poll_interval.during
        while not self.stopping:
            try:
                if self._answer_next(session):
                    last = time.monotonic()
                    continue
            except MessageExpired:
                log.info("a message is not answered: its run was stopped, or it is not whole")
            if self.chores.idle():
                return
            self._wait(self.poll_interval.pause(time.monotonic() - last))

    def _answer_next(self, session: SuperLinkSession) -> bool:
        """Take and answer one message; return whether there was one."""
        received = session.receive()
        if received is None:
            return False
        self.chores.came()
        started = time.monotonic()
        session.reply(received, self.answer(received, session.node_id), time.monotonic() - started)
        self.chores.answered()
        return True

    def answer(self, received: ReceivedMessage, node_id: int) -> Message:
        """Return the site's reply to one message, sealed."""
        message = received.message
        try:
            reply = app(message, self._context(received.run_id, node_id))
            assert reply.has_content()  # noqa: S101  # our handlers answer in every case
            seal(reply.content, site=self.site, request=message.metadata.message_id, sign=self.sign)
        except Exception as error:
            log.error("a message failed: %s", type(error).__name__)
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code, type(error).__name__), reply_to=message)
        return reply

    def _context(self, run_id: int, node_id: int) -> Context:
        if run_id not in self.contexts:
            while len(self.contexts) >= RUNS:
                self.contexts.pop(next(iter(self.contexts)))
            self.contexts[run_id] = Context(
                run_id=run_id,
                node_id=node_id,
                node_config=dict(self.node_config),
                state=RecordDict(),
                run_config={},
            )
        return self.contexts[run_id]

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))


def make_tls(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer: only the federation's CA, this site's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=ca)
    context.load_cert_chain(certificate, key)
    return context


def _explain(error: SessionError, failures: int, endpoint: str) -> float:
    """Log the error and its remedy; return the seconds until the next try."""
    if isinstance(error, SessionAlive):
        log.warning(
            "the coordinator has a session of this site that is still alive, or does not know its "
            "key: a killed site is back within 90 s; a second process of this site never is"
        )
    elif isinstance(error, Refused):
        log.error(
            "refused by %s (%s): run `fedgraft site doctor`; an expired or revoked certificate "
            "needs a new kit",
            endpoint,
            error,
        )
    elif isinstance(error, SessionUnknown) and failures > PATIENCE:
        log.warning(
            "%s knows no session of this site (%s): if this goes on, it was removed, or this clock "
            "is wrong: run `fedgraft site doctor`",
            endpoint,
            error,
        )
    elif isinstance(error, Unreachable) and failures > 1:
        log.warning("%s does not answer (%s): trying again", endpoint, error)
    pause = PAUSES.get(type(error), min(SOON * 2 ** min(failures - 1, 4), 10.0))
    return float(pause * (0.75 + secrets.randbelow(501) / 1000))  # sites must not come all together
