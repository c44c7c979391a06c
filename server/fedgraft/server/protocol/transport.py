"""Send requests to sites and take their replies as they arrive, over any Flower ``Grid``.

The code of a round is the same for a simulation and for partner sites, because both are a ``Grid``.
Replies are pulled one by one, so that memory does not grow with the number of sites.
"""

import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedgraft.common.errors import MessageError
from fedgraft.common.messages.codec import Shared, Stage, decode, encode, wire_bytes
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    Payload,
    PlanReply,
    PlanRequest,
    Refusal,
    Request,
    ResultReply,
    ResultRequest,
    SharesAsk,
    TrainReply,
    TrainRequest,
    UnmaskAsk,
)
from fedgraft.common.messages.signatures import unseal
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    MaskedInput,
    Opening,
    SealedShares,
)

__all__ = ["SILENT", "Reply", "Transport", "Watch"]

ANSWERS: dict[type[Request], type[Payload]] = {
    PlanRequest: PlanReply,
    TrainRequest: TrainReply,
    EvaluateRequest: EvaluateReply,
    KeysAsk: Advertisement,
    SharesAsk: SealedShares,
    MaskedTrain: MaskedInput,
    MaskedEvaluate: MaskedInput,
    ConfirmAsk: Confirmation,
    UnmaskAsk: Opening,
    ResultRequest: ResultReply,
}
Watch = Callable[[Stage, int, int], None]
CODE = re.compile(r"[A-Za-z0-9_-]{1,64}")
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.1  # seconds between pulls without a reply

# Failures of sites that may not be connected at all.
SILENT = frozenset({"deadline", "expired", "site-unreachable", "not-sent"})
# Refusals that a person at the site may withdraw at any time; such a node is invited again.
PENDING = frozenset({"approval-pending", "policy-hours"})
# Names for Flower's error codes, because a name tells a person more than a number.
FLOWER_ERRORS = {2: "app-failed", 3: "expired", 5: "site-unreachable", 8: "app-died"}


@dataclass(frozen=True)
class Reply:
    """The result of a request to one site: a ``payload`` or a ``failure`` code; bytes sent.

    ``sealed`` is the name of the site that signed the reply, if replies are signed.
    """

    site: str
    payload: Payload | None = None
    failure: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    sealed: str | None = None


class Transport:
    """The sites of a federation by name, behind a Flower grid.

    ``watch`` is called after every reply with the stage, the number of replies and the number of
    requests. With ``key_of``, which returns a site's public key, a reply counts only with the
    site's seal.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        key_of: Callable[[str], bytes | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        watch: Watch = lambda stage, done, total: None,
    ) -> None:
        self._grid = grid
        self._key_of = key_of
        self._watch = watch
        self._clock = clock
        self._pause = pause
        self._nodes: dict[str, int] = {}
        self._asked: set[int] = set()

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that agreed to take part, sorted."""
        return tuple(sorted(self._nodes))

    def wait_for(self, count: int, deadline: float) -> None:
        """Wait until ``count`` nodes are connected, or ``deadline`` seconds have passed."""
        until = self._clock() + deadline
        while len(list(self._grid.get_node_ids())) < count and self._clock() < until:
            self._pause(LONGEST_PAUSE)

    def invite(
        self,
        request: PlanRequest,
        deadline: float,
        *,
        again: bool = True,
        members: Container[str] | None = None,
    ) -> Iterator[Reply]:
        """Ask nodes to take part, and yield their replies; nodes that agree get a site's name.

        The nodes asked are those that were not asked since they connected and, with ``again``,
        those that did not agree before. A site whose node has left may come back, also with another
        node. If ``members`` is given, a site that is not among them cannot take part.
        """
        present = set(self._grid.get_node_ids())
        self._nodes = {site: node for site, node in self._nodes.items() if node in present}
        self._asked &= present  # a node that comes back has a new process
        settled = set(self._nodes.values()) | (set() if again else self._asked)
        new = {f"node {node}": node for node in sorted(present - settled)}
        self._asked.update(new.values())
        for reply in self._ask(new, Stage.PLAN, request, deadline):
            answer = reply.payload
            if reply.failure in PENDING:
                self._asked.discard(new[reply.site])
            if isinstance(answer, PlanReply) and reply.sealed not in (None, answer.site):
                yield replace(reply, payload=None, failure="another-sites-seal")
                continue
            if not isinstance(answer, PlanReply):
                yield replace(reply, site=reply.sealed or reply.site)
            elif failure := self._refusal(answer, request.session, members):
                known = answer.site if failure in ("name-taken", "not-in-roster") else reply.site
                yield replace(reply, site=known, payload=None, failure=failure)
            else:
                self._nodes[answer.site] = new[reply.site]
                yield replace(reply, site=answer.site)

    def _refusal(self, answer: PlanReply, session: str, members: Container[str] | None) -> str:
        """Return the reason why a site that agreed is refused; empty if it is accepted."""
        if answer.session != session:
            return "wrong-session"
        if not SITE_NAME.fullmatch(answer.site):  # the name goes into files and terminals
            return "bad-name"
        if members is not None and answer.site not in members:
            return "not-in-roster"
        return "name-taken" if answer.site in self._nodes else ""

    def ask(
        self,
        sites: Iterable[str],
        stage: Stage,
        request: Request | Mapping[str, Request],
        deadline: float,
    ) -> Iterator[Reply]:
        """Send ``request`` to ``sites``, and yield one reply for each within ``deadline`` seconds.

        A mapping gives each site its own request. If a site refuses, fails, sends another payload
        or is late, its reply has a ``failure`` code instead of a payload. No request is sent twice.
        """
        return self._ask({site: self._nodes[site] for site in sites}, stage, request, deadline)

    def _ask(
        self,
        nodes: dict[str, int],
        stage: Stage,
        request: Request | Mapping[str, Request],
        deadline: float,
    ) -> Iterator[Reply]:
        until = self._clock() + deadline
        asked = list(_encoded(nodes, request))
        messages = [
            Message(one.record, dst_node_id=one.node, message_type=stage.value, ttl=deadline)
            for one in asked
        ]
        sent = list(self._grid.push_messages(messages))
        del messages
        # For a message that it could not send, Flower returns an empty id; for a batch, no ids.
        sent += [""] * (len(asked) - len(sent))
        for identifier, one in zip(sent, asked, strict=True):
            if not identifier:
                yield Reply(one.site, failure="not-sent")
        waiting = {
            identifier: replace(one, record=None)  # the grid has the record; free it here
            for identifier, one in zip(sent, asked, strict=True)
            if identifier
        }
        del asked
        yield from self._collect(waiting, until, stage)

    def _collect(self, waiting: dict[str, "_Asked"], until: float, stage: Stage) -> Iterator[Reply]:
        """Yield the reply of every site in ``waiting`` (by message id); a late one has failed."""
        pause, total = FIRST_PAUSE, len(waiting)
        while waiting and self._clock() < until:
            came, looked = False, time.perf_counter()
            for identifier in list(waiting):
                for message in self._grid.pull_messages([identifier]):
                    asked = waiting.pop(identifier, None)
                    if asked is not None:  # otherwise the reply came twice
                        came = True
                        self._watch(stage, total - len(waiting), total)
                        yield self._read(asked, message, identifier)
            if waiting and not came:
                # A pull costs the SuperLink time that it needs to pass on replies. Therefore this
                # loop pulls during at most half of the time.
                self._pause(min(max(pause, time.perf_counter() - looked), LONGEST_PAUSE))
            pause = FIRST_PAUSE if came else min(2 * pause, LONGEST_PAUSE)
        for asked in waiting.values():
            yield Reply(asked.site, failure="deadline", bytes_down=asked.size)

    def _read(self, asked: "_Asked", message: Message, request: str) -> Reply:
        reply = Reply(asked.site, bytes_down=asked.size)
        if message.has_error():
            code = message.error.code
            return replace(reply, failure=FLOWER_ERRORS.get(code, f"flower-error-{code}"))
        reply = replace(reply, bytes_up=wire_bytes(message.content))
        try:
            reply = replace(reply, sealed=self._unseal(asked, message, request))
        except MessageError:
            return replace(reply, failure="bad-seal")
        try:
            payload = decode(message.content, ANSWERS[asked.kind], Refusal)
        except MessageError:
            return replace(reply, failure="malformed")
        if isinstance(payload, Refusal):  # its code goes into events and terminals
            code = payload.code if CODE.fullmatch(payload.code) else "bad-code"
            return replace(reply, failure=code)
        return replace(reply, payload=payload)

    def _unseal(self, asked: "_Asked", message: Message, request: str) -> str | None:
        """Return the name of the site that signed the reply; None if replies are not signed.

        Except for an invitation, it must be the site that was asked. ``request`` is the id of our
        request, because the id in the reply proves nothing.

        Raises:
            MessageError: the seal is missing or wrong, or another site made it.
        """
        if self._key_of is None:
            return None
        site = unseal(message.content, request=request, key_of=self._key_of)
        if asked.kind is not PlanRequest and site != asked.site:
            raise MessageError("the seal of another site")
        return site


@dataclass(frozen=True)
class _Asked:
    """A request to one site: its kind, its ``size`` in bytes, and the record until it is sent."""

    site: str
    node: int
    kind: type[Request]
    size: int
    record: RecordDict | None


def _encoded(
    nodes: Mapping[str, int], request: Request | Mapping[str, Request]
) -> Iterator[_Asked]:
    """Yield the encoded request of every site; parts that requests share are encoded once."""
    arrays: Shared = {}
    records: dict[int, tuple[Request, RecordDict, int]] = {}  # by id()
    for site, node in nodes.items():
        own = request[site] if isinstance(request, Mapping) else request
        if id(own) not in records:
            record = encode(own, arrays)
            records[id(own)] = own, record, wire_bytes(record)
        _, record, size = records[id(own)]
        yield _Asked(site, node, type(own), size, record)
