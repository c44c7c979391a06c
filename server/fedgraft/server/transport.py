"""Ask sites something and take their replies as they arrive, over any Flower ``Grid``.

The round's story cannot tell a simulation from a federation: both are a ``Grid``. Replies are
pulled one by one, so memory does not grow with the number of sites.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedgraft.common.errors import MessageError
from fedgraft.common.messages import (
    EvaluateReply,
    Payload,
    PlanReply,
    PlanRequest,
    Refusal,
    Stage,
    TrainReply,
    decode,
    encode,
    wire_bytes,
)

__all__ = ["SILENT", "Reply", "Transport"]

ANSWERS = {Stage.PLAN: PlanReply, Stage.TRAIN: TrainReply, Stage.EVALUATE: EvaluateReply}
CODE = re.compile(r"[A-Za-z0-9_-]{1,64}")
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25  # seconds between pulls that brought nothing

# Failures of sites that may not be there at all.
SILENT = frozenset({"deadline", "expired", "site-unreachable", "not-sent"})
# Flower's error codes that mean more to a person than their number.
FLOWER_ERRORS = {2: "app-failed", 3: "expired", 5: "site-unreachable", 8: "app-died"}


@dataclass(frozen=True)
class Reply:
    """What came of asking one site: a ``payload``, or a ``failure`` code; bytes on the wire."""

    site: str
    payload: Payload | None = None
    failure: str = ""
    bytes_up: int = 0


class Transport:
    """The sites of a federation by name, behind a Flower grid."""

    def __init__(
        self,
        grid: Grid,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid = grid
        self._clock = clock
        self._pause = pause
        self._nodes: dict[str, int] = {}
        self._asked: set[int] = set()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that agreed to take part, sorted."""
        return tuple(sorted(self._nodes))

    def wait_for(self, count: int, deadline: float) -> None:
        """Wait until ``count`` nodes are connected, or ``deadline`` seconds have passed."""
        until = self._clock() + deadline
        while len(list(self._grid.get_node_ids())) < count and self._clock() < until:
            self._pause(LONGEST_PAUSE)

    def invite(
        self, request: PlanRequest, deadline: float, *, again: bool = True
    ) -> Iterator[Reply]:
        """Ask nodes to take part; those that agree are known by their site's name after.

        Asks nodes that were never asked and, with ``again``, those that did not agree before. A
        site whose node has left may come back with another node.
        """
        present = set(self._grid.get_node_ids())
        self._nodes = {site: node for site, node in self._nodes.items() if node in present}
        settled = set(self._nodes.values()) | (set() if again else self._asked)
        new = {f"node {node}": node for node in sorted(present - settled)}
        self._asked.update(new.values())
        for reply in self._ask(new, Stage.PLAN, request, deadline):
            answer = reply.payload
            if not isinstance(answer, PlanReply):
                yield reply
            elif failure := self._refusal(answer, request.session):
                known = answer.site if failure == "name-taken" else reply.site
                yield Reply(known, failure=failure, bytes_up=reply.bytes_up)
            else:
                self._nodes[answer.site] = new[reply.site]
                yield Reply(answer.site, answer, bytes_up=reply.bytes_up)

    def _refusal(self, answer: PlanReply, session: str) -> str:
        """Why a site that agreed is not taken; empty if it is."""
        if answer.session != session:
            return "wrong-session"
        if not SITE_NAME.fullmatch(answer.site):  # it goes into files, tables and terminals
            return "bad-name"
        return "name-taken" if answer.site in self._nodes else ""

    def ask(
        self, sites: Sequence[str], stage: Stage, request: Payload, deadline: float
    ) -> Iterator[Reply]:
        """Send ``request`` to ``sites``; one reply for each, within ``deadline`` seconds.

        A site that refuses, fails, sends something else or is late yields a reply with a
        ``failure`` code instead of a payload.
        """
        return self._ask({site: self._nodes[site] for site in sites}, stage, request, deadline)

    def _ask(
        self, nodes: dict[str, int], stage: Stage, request: Payload, deadline: float
    ) -> Iterator[Reply]:
        until = self._clock() + deadline
        record = encode(request)
        messages = [
            Message(record, dst_node_id=node, message_type=stage.value, ttl=deadline)
            for node in nodes.values()
        ]
        sent = list(self._grid.push_messages(messages))
        del messages
        # Flower answers a message it could not send with an empty id, a whole batch with none.
        sent += [""] * (len(nodes) - len(sent))
        waiting = {i: site for i, site in zip(sent, nodes, strict=True) if i}
        for site in set(nodes) - set(waiting.values()):
            yield Reply(site, failure="not-sent")
        yield from self._collect(waiting, stage, until)

    def _collect(self, waiting: dict[str, str], stage: Stage, until: float) -> Iterator[Reply]:
        """The reply of every site in ``waiting`` (by message id) as it comes, or its lateness."""
        pause = FIRST_PAUSE
        while waiting and self._clock() < until:
            came = False
            for identifier in list(waiting):
                for message in self._grid.pull_messages([identifier]):
                    site = waiting.pop(identifier, None)
                    if site is not None:  # else the reply came twice
                        came = True
                        yield self._read(site, stage, message)
            if waiting and not came:
                self._pause(pause)
            pause = FIRST_PAUSE if came else min(2 * pause, LONGEST_PAUSE)
        for site in waiting.values():
            yield Reply(site, failure="deadline")

    def _read(self, site: str, stage: Stage, message: Message) -> Reply:
        if message.has_error():
            code = message.error.code
            return Reply(site, failure=FLOWER_ERRORS.get(code, f"flower-error-{code}"))
        size = wire_bytes(message.content)
        try:
            payload = decode(message.content, ANSWERS[stage], Refusal)
        except MessageError:
            return Reply(site, failure="malformed", bytes_up=size)
        if isinstance(payload, Refusal):  # its code goes into events, tables and terminals
            code = payload.code if CODE.fullmatch(payload.code) else "bad-code"
            return Reply(site, failure=code, bytes_up=size)
        return Reply(site, payload, bytes_up=size)
