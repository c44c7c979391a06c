"""The payloads of messages between coordinator and site: one typed payload per stage.

A payload is a frozen dataclass of strings, numbers, bytes, arrays, and of such dataclasses. The
replies of a site in a masked round are the statements of ``common.secagg``.
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
    """Coordinator to site, once per session: the question whether the site takes part in this job.

    ``job`` is ``Job.for_sites()`` as JSON. ``layout`` is the fingerprint of the exchanged adapter.
    ``fixed`` is the SHA-256 of the adapter tensors that are not exchanged but must be equal.
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

    ``attempt`` counts from 0: a round without a result is repeated with other random draws.
    """

    session: str
    round: int
    attempt: int
    job: str
    names: tuple[str, ...]
    adapter: NDArray[Any]


@dataclass(frozen=True)
class TrainReply:
    """``update`` is the trained minus the received adapter, float32; ``loss`` is the mean loss.

    ``examples`` is the number of training targets that ``loss`` is the mean of, and the site's
    weight: its examples, or if they are made of parts, the parts (``Examples.target_count``).
    """

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
    """The site refused or failed; ``code`` is a reason code or class name, never an error text."""

    session: str
    code: str


@dataclass(frozen=True)
class Work:
    """The work of a masked round; ``stage`` is ``train`` in round ``round``, or ``evaluate`` after.

    ``adapter`` is the SHA-256 of an adapter; the adapter itself is sent only after the sites have
    agreed on the masks.
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
    """Begin a masked round; the sites with the ids in ``cohort`` take part together.

    ``work`` and ``request.model`` are a commitment to the work that follows.
    """

    session: str
    work: Work
    cohort: tuple[int, ...]
    request: KeysRequest


@dataclass(frozen=True)
class SharesAsk:
    """The keys of all sites, with the request to share secrets with the neighbours."""

    session: str
    request: SharesRequest


@dataclass(frozen=True)
class MaskedTrain:
    """Train, then reply with a ``MaskedInput`` under the agreed masks."""

    train: TrainRequest
    delivery: Delivery

    @property
    def session(self) -> str:
        """Return the session; every request has this name."""
        return self.train.session


@dataclass(frozen=True)
class MaskedEvaluate:
    """Evaluate, then reply with a ``MaskedInput`` under the agreed masks."""

    evaluate: EvaluateRequest
    delivery: Delivery

    @property
    def session(self) -> str:
        """Return the session; every request has this name."""
        return self.evaluate.session


@dataclass(frozen=True)
class ConfirmAsk:
    """The list of sites whose inputs are in the sum, with the request to sign it."""

    session: str
    survivors: Survivors


@dataclass(frozen=True)
class UnmaskAsk:
    """Enough sites have signed: the request to reveal one share of each neighbour."""

    session: str
    request: UnmaskRequest


@dataclass(frozen=True)
class PastRound:
    """The result of a round of the federation, over all its sites.

    ``loss`` is the training loss. ``accuracy`` is that of federated validation, NaN if there was
    none.
    """

    round: int
    sites: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class ResultRequest:
    """Coordinator to site, once at the end of a run: the result, for the site to keep.

    ``adapter`` is the final adapter, float32 [layout size]; ``round`` is the last round, ``run``
    the name of the run, ``sites`` the number of sites that took part.
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
    """The site has kept the result."""

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
