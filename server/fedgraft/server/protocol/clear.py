"""The replies of a round in clear as they are added up, and how a crash half-way costs little."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedgraft.common.aggregation import RULES
from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.payloads import TrainReply, TrainRequest
from fedgraft.server.protocol.transport import Reply
from fedgraft.server.protocol.validation import Expected, InvalidReply, check_update
from fedgraft.server.state import Gathered, Partial, Traffic

__all__ = ["Gathering", "Halfway"]


@dataclass
class Halfway:
    """Where a round under way is kept: not more often than every ``seconds``.

    And only after a multiple of ``every`` replies: a simulation trains that many sites in one pass,
    and going on must find the same sites side by side.
    """

    load: Callable[[int, int], Partial | None]
    save: Callable[[Partial], None]
    every: int = 1
    seconds: float = 10.0
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def due(self, replies: int) -> bool:
        """Whether to save now, with so many ``replies``."""
        if replies % self.every or self.clock() - self._last < self.seconds:
            return False
        self._last = self.clock()
        return True


class Gathering:
    """What the replies to ``request`` came to so far."""

    def __init__(self, job: Job, request: TrainRequest, exchanged: Layout) -> None:
        self._job, self._request = job, request
        self._expected = Expected(request.session, request.round, exchanged)
        self._collector = RULES[job.aggregation.rule].collect(exchanged.size)
        self._examples, self._loss = 0, 0.0
        self.traffic = Traffic()
        self.answered: dict[str, None] = {}  # in order

    @property
    def count(self) -> int:
        """Usable updates."""
        return self._collector.count

    def take(self, reply: Reply) -> None:
        """Add a reply up if it is valid, or note why it does not count."""
        self.answered[reply.site] = None
        self.traffic.count(reply)
        update = reply.payload
        if not isinstance(update, TrainReply):
            self.traffic.drop(reply.site, reply.failure)
            return
        try:
            check_update(update, self._expected, self._job.aggregation)
        except InvalidReply as error:
            self.traffic.drop(reply.site, str(error))
            return
        by_examples = self._job.aggregation.weights == "examples"
        self._collector.add(update.update, float(update.examples) if by_examples else 1.0)
        self._examples += update.examples
        self._loss += update.loss * update.examples

    def gathered(self) -> Gathered:
        """The round's result; there must be a usable update."""
        loss = self._loss / self._examples
        return Gathered(self._collector.combined(), self.count, self._examples, loss, self.traffic)

    def partial(self) -> Partial:
        """All of it, to be kept."""
        return Partial(
            round=self._request.round,
            attempt=self._request.attempt,
            answered=tuple(self.answered),
            examples=self._examples,
            loss=self._loss,
            traffic=self.traffic,
            tensors=self._collector.kept(),
        )

    def go_on(self, partial: Partial) -> None:
        """Take up what ``partial`` kept."""
        self.answered = dict.fromkeys(partial.answered)
        self._examples, self._loss = partial.examples, partial.loss
        self.traffic = partial.traffic
        self._collector.restore(partial.tensors)
