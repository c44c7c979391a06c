"""Validation of a site's reply, before any other code uses it.

If a reply is not valid, only its site loses its update in this round; other sites lose nothing.
"""

from dataclasses import dataclass

import numpy as np

from fedgraft.common.config.sections import Aggregation
from fedgraft.common.errors import FedgraftError
from fedgraft.common.layout import Layout
from fedgraft.common.messages.payloads import EvaluateReply, TrainReply
from fedgraft.common.metrics.evaluation import Measures
from fedgraft.common.metrics.tally import Tally

__all__ = ["Expected", "InvalidReply", "check_evaluation", "check_update"]


LARGEST_LOSS = 1e6  # nats; far above any cross entropy of finite logits, and sums stay finite


class InvalidReply(FedgraftError):
    """A reply that is dropped; the message is a reason code."""


@dataclass(frozen=True)
class Expected:
    """The session, round and layout that every reply of this stage must carry."""

    session: str
    round: int
    layout: Layout


def check_update(
    reply: TrainReply, expected: Expected, limits: Aggregation, measures: Measures
) -> None:
    """Check a site's update.

    Raises:
        InvalidReply: ``wrong-session``, ``wrong-round``, ``wrong-layout``, ``wrong-dtype``,
            ``wrong-shape``, ``not-finite``, ``norm-too-large``, ``bad-count`` or ``bad-loss``.
    """
    update = reply.update
    _check_origin(reply, expected)
    problems = {
        "wrong-layout": reply.layout != expected.layout.fingerprint,
        "wrong-dtype": update.dtype != np.float32,
        "wrong-shape": update.shape != (expected.layout.size,),
        "bad-count": not 1 <= reply.examples <= limits.max_examples * measures.most_parts,
        "bad-loss": not 0.0 <= reply.loss <= LARGEST_LOSS,
    }
    _raise_first(problems)
    # The norm is in float64, because squares of large float32 values would overflow to infinity.
    norm = float(np.linalg.norm(update.astype(np.float64)))
    _raise_first(
        {"not-finite": not np.isfinite(norm), "norm-too-large": norm > limits.max_update_norm}
    )


def check_evaluation(
    reply: EvaluateReply, expected: Expected, limits: Aggregation, measures: Measures
) -> Tally:
    """Check a site's evaluation and return its tally.

    Raises:
        InvalidReply: ``wrong-session``, ``wrong-round``, ``bad-count`` or ``bad-loss``.
        MessageError: the vector is not a tally of ``measures``.
    """
    _check_origin(reply, expected)
    tally = Tally.from_vector(reply.tally, measures)
    most = limits.max_examples * measures.most_parts
    _raise_first({"bad-count": tally.examples > most, "bad-loss": tally.loss < 0.0})
    return tally


def _check_origin(reply: TrainReply | EvaluateReply, expected: Expected) -> None:
    _raise_first(
        {
            "wrong-session": reply.session != expected.session,
            "wrong-round": reply.round != expected.round,
        }
    )


def _raise_first(problems: dict[str, bool]) -> None:
    for code, present in problems.items():
        if present:
            raise InvalidReply(code)
