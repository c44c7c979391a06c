"""The site's side of a round: one handler per stage, which turns a request into a reply.

Flower runs ``app`` at a site, in a simulation and in a federation. The path of the site's
configuration comes from the node, never from a message. The site logs its errors itself. The
coordinator gets a reason code, never an exception's text, because that text may quote data.
"""

import logging
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgraft.client.masked_participant import Kept, MaskedParticipant
from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.policy.reasons import explain, keep_reason
from fedgraft.client.results.store import keep_result
from fedgraft.client.training.trainer import Trained, Wanted, train_together
from fedgraft.common.errors import FedgraftError, SiteFailure
from fedgraft.common.messages.codec import decode, encode, recall, remember
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    PlanRequest,
    Refusal,
    Reply,
    Request,
    ResultRequest,
    SharesAsk,
    TrainRequest,
    UnmaskAsk,
)
from fedgraft.common.secagg.errors import SecAggError

log = logging.getLogger("fedgraft.client")

app = ClientApp()

Ask = TypeVar("Ask", bound=Request)
Steps = Generator[Wanted, Trained, Reply]  # of an answer that needs training


@app.query("plan")
def plan(message: Message, context: Context) -> Message:
    """Decide whether this site takes part in the job."""
    return _answer(message, context, lambda at, ask: at.agree(ask), PlanRequest)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """Begin a masked round: advertise fresh keys."""
    return _answer(message, context, _masked(context, MaskedParticipant.keys), KeysAsk)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """Share the secrets of a masked round with neighbours."""
    return _answer(message, context, _masked(context, MaskedParticipant.shares), SharesAsk)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter on this site's data and reply with the update, in clear or masked."""
    return train_all([(message, context)])[0]


def train_all(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Run ``train`` for several sites of this process, in one pass over the backbone."""
    return train_together(
        [
            _answering(message, context, _training(context), TrainRequest, MaskedTrain)
            for message, context in asked
        ]
    )


def _training(context: Context) -> Callable[[Participant, TrainRequest | MaskedTrain], Steps]:
    def handle(at: Participant, request: TrainRequest | MaskedTrain) -> Steps:
        if not isinstance(request, MaskedTrain):
            at.check_clear(request)
            return (yield from at.train(request))
        masked = MaskedParticipant(at, recall(context.state, Kept))
        try:
            return (yield from masked.train(request))
        finally:
            remember(context.state, masked.kept)

    return handle


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapter on this site's data and reply with sums, in clear or masked."""

    def handle(at: Participant, request: EvaluateRequest | MaskedEvaluate) -> Reply:
        if isinstance(request, MaskedEvaluate):
            return _masked(context, MaskedParticipant.evaluate)(at, request)
        at.check_clear(request)
        return at.evaluate(request)

    return _answer(message, context, handle, EvaluateRequest, MaskedEvaluate)


@app.query("confirm")
def confirm(message: Message, context: Context) -> Message:
    """Sign the list of sites whose inputs are in the masked sum."""
    return _answer(message, context, _masked(context, MaskedParticipant.confirm), ConfirmAsk)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Reveal one share of each neighbour's secrets."""
    return _answer(message, context, _masked(context, MaskedParticipant.unmask), UnmaskAsk)


@app.query("result")
def result(message: Message, context: Context) -> Message:
    """Keep the result of the run."""
    return _answer(message, context, keep_result, ResultRequest)


def _masked(
    context: Context, handle: Callable[[MaskedParticipant, Ask], Reply]
) -> Callable[[Participant, Ask], Reply]:
    """Return ``handle`` with the memory of the current round, which Flower keeps for this node."""

    def handled(at: Participant, request: Ask) -> Reply:
        masked = MaskedParticipant(at, recall(context.state, Kept))
        try:
            return handle(masked, request)
        finally:
            remember(context.state, masked.kept)

    return handled


def _answer(
    message: Message,
    context: Context,
    handle: Callable[[Participant, Any], Reply],
    *kinds: type[Request],
) -> Message:
    return train_together([_answering(message, context, handle, *kinds)])[0]


def _answering(
    message: Message,
    context: Context,
    handle: Callable[[Participant, Any], Reply | Steps],
    *kinds: type[Request],
) -> Generator[Wanted, Trained, Message]:
    """Return an answer in every case, also after an error; yield the training that it needs."""
    what = message.metadata.message_type
    under_way = 0
    at: Participant | None = None
    request: Request | None = None
    reply: Reply
    try:
        at = open_participant(context.node_config)
        request = decode(message.content, *kinds)
        if at.guard is not None:
            under_way = _round_under_way(context)
            at.guard.admit(what, request, message.content, under_way)
        came = handle(at, request)
        reply = (yield from came) if isinstance(came, Generator) else came
    except Exception as error:
        session = "" if request is None else request.session
        reply = _refusal(what, session, error)
        if at is not None and at.guard is not None:
            keep_reason(at.state, what, session, reply.code, error)
    if at is None or at.guard is None:
        return Message(encode(reply), reply_to=message)
    leaving, content = at.guard.release(what, request, reply, under_way)
    if leaving is not reply and isinstance(leaving, Refusal):
        remember(context.state, None)  # a reply that did not leave is no part of a masked round
    return Message(content, reply_to=message)


def _refusal(what: str, session: str, error: Exception) -> Refusal:
    """Return the refusal that the coordinator gets for an error; the site's log says why."""
    kind = error.code if isinstance(error, SiteFailure) else type(error).__name__
    why, hint = explain(error)
    cause = error.__cause__ if isinstance(error, SiteFailure) else None
    if cause is not None and not isinstance(cause, FedgraftError | SecAggError):
        where = "".join(traceback.format_tb(cause.__traceback__))
        log.error("%s failed: %s\n%s", what, type(cause).__name__, where)
    if isinstance(error, FedgraftError):
        told = [kind, *filter(None, (why, hint and f"hint: {hint}"))]
        log.warning("%s refused: %s", what, "; ".join(told))
    else:
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s failed: %s\n%s", what, kind, where)
    return Refusal(session, kind)


def _round_under_way(context: Context) -> int:
    """Return the round of the current masked stage; 0 outside masked rounds."""
    kept = recall(context.state, Kept)
    return kept.round if kept else 0
