"""The site's side of a round: one handler per stage, each a request in and a reply out.

``app`` is what Flower runs at a site, in a simulation as in a federation. Where the site keeps its
configuration comes from the node, never from a message. What goes wrong here is logged here; the
coordinator gets a reason code, never an exception's text, which may quote data.
"""

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgraft.client.participant import Participant, open_participant
from fedgraft.common.errors import DataError, FedgraftError, SiteFailure
from fedgraft.common.messages import (
    EvaluateRequest,
    Payload,
    PlanRequest,
    Refusal,
    TrainRequest,
    decode,
    encode,
)

log = logging.getLogger("fedgraft.client")

app = ClientApp()

Request = TypeVar("Request", PlanRequest, TrainRequest, EvaluateRequest)


@app.query("plan")
def plan(message: Message, context: Context) -> Message:
    """Will this site take part in the job?"""
    return _answer(message, context, PlanRequest, Participant.agree)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter on this site's data and reply with what changed."""
    return _answer(message, context, TrainRequest, Participant.train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapter on this site's data and reply with sums."""
    return _answer(message, context, EvaluateRequest, Participant.evaluate)


def _answer(
    message: Message,
    context: Context,
    kind: type[Request],
    handle: Callable[[Participant, Request], Payload],
) -> Message:
    session = ""
    reply: Payload
    try:
        request = decode(message.content, kind)
        session = request.session
        reply = handle(open_participant(context.node_config), request)
    except SiteFailure as error:
        log.warning("%s refused: %s", kind.__name__, error.code)
        reply = Refusal(session, error.code)
    except FedgraftError as error:
        # Our own words, but those about data name labels.
        what = "" if isinstance(error, DataError) else f": {error}"
        log.warning("%s refused: %s%s", kind.__name__, type(error).__name__, what)
        reply = Refusal(session, type(error).__name__)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s failed: %s\n%s", kind.__name__, type(error).__name__, where)
        reply = Refusal(session, type(error).__name__)
    return Message(encode(reply), reply_to=message)
