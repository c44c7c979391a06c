"""What coordinator and site say to each other: one typed payload per stage.

A payload is a frozen dataclass of strings, numbers, bytes, arrays, and of such dataclasses. What a
site replies in a masked round are the statements of ``common.secagg``.
"""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    KeysRequest,
    MaskedInput,
    Opening,
    SealedShares,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)

__all__ = [
    "ConfirmAsk",
    "EvaluateReply",
    "EvaluateRequest",
    "KeysAsk",
    "MaskedEvaluate",
    "MaskedTrain",
    "PastRound",
    "Payload",
    "PlanReply",
    "PlanRequest",
    "Refusal",
    "Reply",
    "Request",
    "ResultReply",
    "ResultRequest",
    "SharesAsk",
    "TrainReply",
    "TrainRequest",
    "UnmaskAsk",
    "Work",
]


@dataclass(frozen=True)
class PlanRequest:
    """Coordinator to site, once a session: will you take part in this job?

    ``job`` is ``Job.for_sites()`` as JSON; ``layout`` the fingerprint of the exchanged adapter;
    ``fixed`` the SHA-256 of the adapter tensors that are not exchanged but must be equal.
    """

    session: str
    job: str
    backbone: str
    layout: str
    names: tuple[str, ...]
    fixed: str


@dataclass(frozen=True)
class PlanReply:
    """The site takes part; ``site`` is its name."""

    session: str
    site: str


@dataclass(frozen=True)
class TrainRequest:
    """Train from this adapter, float32 [layout size]; ``names`` are its tensors, all trained.

    ``attempt`` counts from 0: a round that came to nothing is done again with other draws.
    """

    session: str
    round: int
    attempt: int
    job: str
    names: tuple[str, ...]
    adapter: NDArray[Any]


@dataclass(frozen=True)
class TrainReply:
    """``update`` = trained minus received adapter, float32; ``loss`` the mean training loss."""

    session: str
    round: int
    layout: str
    examples: int
    loss: float
    update: NDArray[Any]


@dataclass(frozen=True)
class EvaluateRequest:
    """Evaluate this adapter on the site's ``split``: ``validation`` or ``test``."""

    session: str
    round: int
    job: str
    names: tuple[str, ...]
    split: str
    adapter: NDArray[Any]


@dataclass(frozen=True)
class EvaluateReply:
    """``tally`` is ``Tally.to_vector()``."""

    session: str
    round: int
    tally: NDArray[Any]


@dataclass(frozen=True)
class Refusal:
    """The site did not do it; ``code`` is a reason code or a class name, never a message's text."""

    session: str
    code: str


@dataclass(frozen=True)
class Work:
    """What a masked round does: ``train`` in round ``round``, or ``evaluate`` after it (``stage``).

    ``adapter`` is the SHA-256 of an adapter that is sent only when the masks are agreed on.
    """

    stage: str
    round: int
    attempt: int
    split: str
    job: str
    names: tuple[str, ...]
    adapter: bytes


@dataclass(frozen=True)
class KeysAsk:
    """Begin a masked round, the sites with the ids in ``cohort`` together.

    ``work`` and ``request.model`` commit to what will follow.
    """

    session: str
    work: Work
    cohort: tuple[int, ...]
    request: KeysRequest


@dataclass(frozen=True)
class SharesAsk:
    """Everyone's keys: share your secrets with your neighbours."""

    session: str
    request: SharesRequest


@dataclass(frozen=True)
class MaskedTrain:
    """Train, then reply with a ``MaskedInput`` under the masks agreed on."""

    train: TrainRequest
    delivery: Delivery

    @property
    def session(self) -> str:
        """The session, as every request names it."""
        return self.train.session


@dataclass(frozen=True)
class MaskedEvaluate:
    """Evaluate, then reply with a ``MaskedInput`` under the masks agreed on."""

    evaluate: EvaluateRequest
    delivery: Delivery

    @property
    def session(self) -> str:
        """The session, as every request names it."""
        return self.evaluate.session


@dataclass(frozen=True)
class ConfirmAsk:
    """Whose inputs are in the sum: sign it."""

    session: str
    survivors: Survivors


@dataclass(frozen=True)
class UnmaskAsk:
    """Enough have signed: reveal one share of each neighbour."""

    session: str
    request: UnmaskRequest


@dataclass(frozen=True)
class PastRound:
    """What a round of the federation came to, over all its sites.

    ``loss`` is of training; ``accuracy`` of federated validation, NaN where there was none.
    """

    round: int
    sites: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class ResultRequest:
    """Coordinator to site, once at the end of a run: this is what it came to, keep it.

    ``adapter`` is the final one, float32 [layout size]; ``round`` the last round, ``run`` the name
    of the run, ``sites`` how many took part.
    """

    session: str
    round: int
    run: str
    job: str
    names: tuple[str, ...]
    sites: int
    rounds: tuple[PastRound, ...]
    adapter: NDArray[Any]


@dataclass(frozen=True)
class ResultReply:
    """The site has kept it."""

    session: str


Request = (
    PlanRequest
    | TrainRequest
    | EvaluateRequest
    | KeysAsk
    | SharesAsk
    | MaskedTrain
    | MaskedEvaluate
    | ConfirmAsk
    | UnmaskAsk
    | ResultRequest
)
Reply = (
    PlanReply
    | TrainReply
    | EvaluateReply
    | Advertisement
    | SealedShares
    | MaskedInput
    | Confirmation
    | Opening
    | ResultReply
    | Refusal
)
Payload = Request | Reply
