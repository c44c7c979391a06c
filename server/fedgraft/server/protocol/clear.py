"""A round in clear: ask the cohort, check each reply and add it up.

An unfinished round is saved, so that a crash loses little. ``masked`` does the same for secure
aggregation.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedgraft.common.aggregation import RULES
from fedgraft.common.config.job import Job
from fedgraft.common.errors import MessageError, TooFewSites
from fedgraft.common.layout import Layout
from fedgraft.common.messages.codec import Stage
from fedgraft.common.messages.payloads import (
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
)
from fedgraft.common.metrics.tally import Tally
from fedgraft.server.protocol.transport import Reply, Transport
from fedgraft.server.protocol.validation import (
    Expected,
    InvalidReply,
    check_evaluation,
    check_update,
)
from fedgraft.server.state import Evaluated, Gathered, Partial, Traffic

__all__ = ["Gathering", "Halfway", "evaluate_clear", "gather_clear"]


@dataclass
class Halfway:
    """Saves and loads an unfinished round; saves at most once in ``seconds``.

    It saves only after a multiple of ``every`` replies. A simulation trains that many sites in one
    pass, and a continued round must train the same sites together.
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
        """Return whether to save now, after this number of ``replies``."""
        if replies % self.every or self.clock() - self._last < self.seconds:
            return False
        self._last = self.clock()
        return True


def gather_clear(
    job: Job,
    transport: Transport,
    cohort: Sequence[str],
    request: TrainRequest,
    exchanged: Layout,
    halfway: Halfway | None = None,
) -> Gathered:
    """Have the cohort train, add each valid update to the rule's collector, return the result.

    A site is not asked again if ``halfway`` holds its reply from before a crash.

    Raises:
        TooFewSites: fewer than ``min_sites`` updates were usable.
    """
    gathering = Gathering(job, request, exchanged)
    if halfway and (partial := halfway.load(request.round, request.attempt)):
        gathering.go_on(partial)
    left = [site for site in cohort if site not in gathering.answered]
    for reply in transport.ask(left, Stage.TRAIN, request, job.rounds.deadline):
        gathering.take(reply)
        if halfway and halfway.due(len(gathering.answered)):
            halfway.save(gathering.partial())
    if gathering.count < job.rounds.min_sites:
        raise _too_few(job, request.round, gathering.count, gathering.traffic)
    return gathering.gathered()


def evaluate_clear(
    job: Job,
    transport: Transport,
    sites: Sequence[str],
    request: EvaluateRequest,
    exchanged: Layout,
) -> Evaluated:
    """Have ``sites`` evaluate; return the sum of their tallies."""
    evaluated = Evaluated(Tally.empty(job.measures), Traffic())
    expected = Expected(request.session, request.round, exchanged)
    for reply in transport.ask(sites, Stage.EVALUATE, request, job.rounds.deadline):
        evaluated.traffic.count(up=reply.bytes_up, down=reply.bytes_down)
        if isinstance(reply.payload, EvaluateReply):
            try:
                tally = check_evaluation(reply.payload, expected, job.aggregation, job.measures)
            except (InvalidReply, MessageError) as error:
                evaluated.traffic.drop(reply.site, f"evaluation: {error}")
            else:
                evaluated = replace(evaluated, tally=evaluated.tally + tally)
        elif reply.failure != "no-examples":  # a small site may have no held-out examples
            evaluated.traffic.drop(reply.site, f"evaluation: {reply.failure}")
    return evaluated


class Gathering:
    """The replies to ``request`` that have come so far, added up."""

    def __init__(self, job: Job, request: TrainRequest, exchanged: Layout) -> None:
        self._job, self._request = job, request
        self._expected = Expected(request.session, request.round, exchanged)
        self._collector = RULES[job.aggregation.rule].collect(exchanged.size)
        self._examples, self._loss = 0, 0.0
        self.traffic = Traffic()
        self.answered: dict[str, None] = {}  # the sites, in order of their replies

    @property
    def count(self) -> int:
        """The number of usable updates."""
        return self._collector.count

    def take(self, reply: Reply) -> None:
        """Add a reply if it is valid; otherwise record why it does not count."""
        self.answered[reply.site] = None
        self.traffic.count(up=reply.bytes_up, down=reply.bytes_down)
        update = reply.payload
        if not isinstance(update, TrainReply):
            self.traffic.drop(reply.site, reply.failure)
            return
        try:
            check_update(update, self._expected, self._job.aggregation, self._job.measures)
        except InvalidReply as error:
            self.traffic.drop(reply.site, str(error))
            return
        by_examples = self._job.aggregation.weights == "examples"
        self._collector.add(update.update, float(update.examples) if by_examples else 1.0)
        self._examples += update.examples
        self._loss += update.loss * update.examples

    def gathered(self) -> Gathered:
        """Return the round's result; there must be at least one usable update."""
        loss = self._loss / self._examples
        return Gathered(self._collector.combined(), self.count, self._examples, loss, self.traffic)

    def partial(self) -> Partial:
        """Return the complete state of the unfinished round, to be saved."""
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
        """Continue from the saved state ``partial``."""
        self.answered = dict.fromkeys(partial.answered)
        self._examples, self._loss = partial.examples, partial.loss
        self.traffic = partial.traffic
        self._collector.restore(partial.tensors)


def _too_few(job: Job, number: int, count: int, traffic: Traffic) -> TooFewSites:
    reasons = ", ".join(f"{drop.site}: {drop.reason}" for drop in traffic.dropped[:5])
    return TooFewSites(
        f"round {number}: {count} usable updates, min_sites is "
        f"{job.rounds.min_sites}" + (f" ({reasons})" if reasons else ""),
        hint="look at the sites named, raise rounds.deadline, or lower rounds.min_sites",
    )
