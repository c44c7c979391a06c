"""The statements of the parties, stage by stage; independent of any transport.

Fields are ints, bytes of a fixed size, tuples of these, and one numpy array. They contain the data
as it arrived: no field may be trusted before ``transcript`` or a party has checked it. Fields that
an outsider should not find in a log are left out of ``repr``.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Advertisement",
    "Aggregate",
    "Confirmation",
    "Delivery",
    "Envelope",
    "KeysRequest",
    "MaskedInput",
    "Opening",
    "RevealedShare",
    "SealedShares",
    "SecAggStage",
    "SharesRequest",
    "Survivors",
    "UnmaskRequest",
]


class SecAggStage(IntEnum):
    """The stages of a round, in order."""

    KEYS = 1
    SHARES = 2
    TRAIN = 3
    CONFIRM = 4
    UNMASK = 5
    OVER = 6


@dataclass(frozen=True, slots=True)
class KeysRequest:
    """Coordinator: begin ``round``; ``context`` and ``model`` are SHA-256 digests."""

    round: int
    context: bytes
    model: bytes


@dataclass(frozen=True, slots=True)
class Advertisement:
    """Site: two fresh X25519 keys (masks, sealing), SHA-256 of its seed, Ed25519 signature."""

    site: int
    mask_key: bytes
    seal_key: bytes
    commitment: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SharesRequest:
    """Coordinator: all advertisements of the round (U1)."""

    advertisements: tuple[Advertisement, ...]


@dataclass(frozen=True, slots=True)
class Envelope:
    """80 bytes from one site to another: a share of the seed and one of the mask key, sealed."""

    sender: int
    recipient: int
    ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Site: one envelope for each neighbour."""

    site: int
    envelopes: tuple[Envelope, ...]


@dataclass(frozen=True, slots=True)
class Delivery:
    """Coordinator: the shares that a site's neighbours sealed for it, with the request to train."""

    envelopes: tuple[Envelope, ...]


@dataclass(frozen=True, slots=True)
class MaskedInput:
    """Site: lanes and update, masked and packed, uint8 [``packed_size``].

    ``signature`` covers the owners of the shares that the site was given; they decide with which
    sites it shares masks.
    """

    site: int
    packed: NDArray[np.uint8] = field(repr=False)
    signature: bytes


@dataclass(frozen=True, slots=True)
class Survivors:
    """Coordinator: the sites that shared (U2) and the sites whose masked input arrived (U3).

    Both are ascending. ``signatures`` are those of the masked inputs, in the order of ``masked``.
    """

    shared: tuple[int, ...]
    masked: tuple[int, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Site: Ed25519 signature over the hash of U1, U2 and U3."""

    site: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class UnmaskRequest:
    """Coordinator: the confirmations, which show that all sites saw the same survivors."""

    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True, slots=True)
class RevealedShare:
    """32 bytes: a share of the owner's seed if it survived, else of its mask key, never both."""

    owner: int
    share: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Opening:
    """Site: one share for each neighbour in U2 and for itself."""

    site: int
    shares: tuple[RevealedShare, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The checked sum over ``survivors``; it is all that the coordinator learns.

    ``sums`` are quantised, int32 [d]; ``quantize.mean`` converts them to floats. ``metrics`` are
    sums over sites. ``disputes`` are pairs (owner, holder) in which the holder's share did not fit
    the other shares: one of the two sites is to blame, but the sum is still correct.
    """

    survivors: tuple[int, ...]
    weight: int
    metrics: tuple[float, ...]
    sums: NDArray[np.int32] = field(repr=False)
    disputes: tuple[tuple[int, int], ...]
