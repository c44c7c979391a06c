"""The signed and hashed content: one injective encoding, the context of a session, statements.

A signature covers ``encode("fedgraft-secagg/1", kind, context, round, model, sender, body)``. The
context contains every number that both parties must agree on. So a statement is not valid in
another session, round, model or parameter set. The roster and the policy come with a site's kit,
never from the coordinator.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.secagg.errors import ParameterError, PolicyRefused, StatementError, blame
from fedgraft.common.secagg.graph import FEWEST, GraphPlan, plan_graph
from fedgraft.common.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, Identity, verify
from fedgraft.common.secagg.quantize import Coding
from fedgraft.common.secagg.statements import Advertisement, Confirmation, Survivors

__all__ = [
    "DIGEST_BYTES",
    "Frame",
    "Parameters",
    "Policy",
    "Roster",
    "advertisement_body",
    "check_advertisement",
    "check_advertisements",
    "check_bytes",
    "check_confirmation",
    "check_held",
    "check_policy",
    "check_survivors",
    "context_hash",
    "digest",
    "encode",
    "hash_adapter",
    "hash_advertisements",
    "hash_model",
    "hash_survivors",
    "held_body",
    "pair_info",
    "seal_info",
    "seed_info",
    "sign",
    "statement",
]

PROTOCOL = "fedgraft-secagg/1"
DIGEST_BYTES, SESSION_BYTES = 32, 16
MOST_SITES = 65535  # points of a Shamir sharing

Field = bytes | str | int | float


def encode(*fields: Field) -> bytes:
    """Return bytes for the fields; two different tuples never give the same bytes.

    They are the number of fields, then for each a type letter, its length in 4 bytes and its
    content: bytes unchanged, text as UTF-8, integers in 8 bytes (signed), floats as double.

    Raises:
        ParameterError: another type, or an integer of more than 64 bits.
    """
    parts = [struct.pack(">I", len(fields))]
    for value in fields:
        if isinstance(value, bytes):
            letter, content = b"b", value
        elif isinstance(value, str):
            letter, content = b"s", value.encode()
        elif type(value) is int and -(1 << 63) <= value < 1 << 63:
            letter, content = b"i", value.to_bytes(8, "big", signed=True)
        elif type(value) is float:
            letter, content = b"f", struct.pack(">d", value)
        else:
            raise ParameterError("a field cannot be encoded")
        parts += (letter, struct.pack(">I", len(content)), content)
    return b"".join(parts)


def digest(*fields: Field) -> bytes:
    """Return the SHA-256 of the encoded fields."""
    return hashlib.sha256(encode(*fields)).digest()


def hash_adapter(adapter: NDArray[np.float32]) -> bytes:
    """Return the hash of a global adapter, float32 [d]."""
    content = np.ascontiguousarray(adapter, "<f4").tobytes()
    return digest("adapter", hashlib.sha256(content).digest(), adapter.size)


def hash_model(adapter: bytes, settings: bytes) -> bytes:
    """Return the hash of a site's task: the hash of the adapter, and the settings."""
    return digest("model", adapter, settings)


@dataclass(frozen=True)
class Roster:
    """The Ed25519 public keys of the federation; a site's id is its position in ``keys``.

    Raises:
        ParameterError: a key is not 32 bytes or appears twice, or there are too many or no keys.
    """

    keys: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= MOST_SITES or len(set(self.keys)) != len(self.keys):
            raise ParameterError("a roster has between 1 and 65535 sites with keys of their own")
        if any(type(key) is not bytes or len(key) != KEY_BYTES for key in self.keys):
            raise ParameterError("a key in the roster is not 32 bytes")

    @property
    def hash(self) -> bytes:
        """Return the SHA-256 over all keys in order."""
        return digest("roster", *self.keys)


@dataclass(frozen=True)
class Policy:
    """The floor in the kit: a site refuses all parameters below it.

    ``colluders`` (T) is the least number of colluders that parameters must assume. ``min_cohort``
    is the least number of sites in a sum. ``min_ring_bits`` and ``max_clip`` limit the coding.

    Raises:
        ParameterError: a number that allows everything.
    """

    colluders: int
    min_cohort: int
    min_ring_bits: int
    max_clip: float

    def __post_init__(self) -> None:
        if self.colluders < 1 or self.min_cohort < FEWEST or not 0 < self.max_clip < math.inf:
            raise ParameterError("a policy is a floor: T >= 1, 3 sites, and a finite clip")


@dataclass(frozen=True)
class Parameters:
    """All choices of the coordinator for a session; sites check them, and signatures cover them.

    ``session`` is 16 bytes that were never used before. ``cohort`` are the ids that take part,
    ascending. ``layout`` is the SHA-256 of the names and shapes of the ``length`` parameters.

    Raises:
        ParameterError: a field is malformed, or the numbers cannot work together.
    """

    session: bytes
    cohort: tuple[int, ...]
    layout: bytes
    length: int
    colluders: int
    dropouts: int
    coding: Coding

    def __post_init__(self) -> None:
        if type(self.session) is not bytes or len(self.session) != SESSION_BYTES:
            raise ParameterError("a session is 16 bytes")
        if type(self.layout) is not bytes or len(self.layout) != DIGEST_BYTES or self.length < 0:
            raise ParameterError("a layout is a SHA-256 digest and a length")
        if not _ascending(self.cohort) or not all(0 <= site < MOST_SITES for site in self.cohort):
            raise ParameterError("a cohort is ascending ids")
        if self.coding.parties < len(self.cohort):
            raise ParameterError("the coding is for fewer parties than the cohort has")
        _ = self.plan  # raises now rather than in a round

    @property
    def plan(self) -> GraphPlan:
        """Return graph degree and thresholds; they are computed, never taken from a message."""
        return plan_graph(len(self.cohort), self.colluders, self.dropouts)


def check_policy(parameters: Parameters, roster: Roster, policy: Policy) -> None:
    """Check that the parameters are not below the federation's floor.

    Raises:
        PolicyRefused: they are below it, or they name a site that is not in the roster.
    """
    if parameters.cohort[-1] >= len(roster.keys):
        raise PolicyRefused("the cohort names a site that is not in the roster")
    if len(parameters.cohort) < policy.min_cohort:
        raise PolicyRefused("the cohort is smaller than the policy allows")
    if parameters.colluders < policy.colluders:
        raise PolicyRefused("fewer colluders are assumed than the policy asks for")
    if parameters.coding.ring_bits < policy.min_ring_bits:
        raise PolicyRefused("the ring is smaller than the policy allows")
    if parameters.coding.clip > policy.max_clip:
        raise PolicyRefused("the clip is larger than the policy allows")


def context_hash(parameters: Parameters, roster: Roster, policy: Policy) -> bytes:
    """Return the SHA-256 over everything that both sides must agree on before the first round."""
    coding, plan = parameters.coding, parameters.plan
    return digest(
        "context",
        PROTOCOL,
        roster.hash,
        encode(policy.colluders, policy.min_cohort, policy.min_ring_bits, float(policy.max_clip)),
        parameters.session,
        encode(*parameters.cohort),
        parameters.length,
        parameters.layout,
        encode(coding.parties, coding.ring_bits, coding.value_bits, coding.max_weight),
        encode(float(coding.clip), float(coding.metric_limit)),
        encode(plan.colluders, plan.dropouts, plan.degree),
        encode(plan.share_threshold, plan.sign_threshold),
    )


@dataclass(frozen=True)
class Frame:
    """The place of a statement: session context, round, and the model of that round."""

    context: bytes
    round: int
    model: bytes


def statement(frame: Frame, kind: str, sender: int, body: bytes) -> bytes:
    """Return the bytes that a signature covers; they are also the info of a derived key."""
    return encode(PROTOCOL, kind, frame.context, frame.round, frame.model, sender, body)


def sign(identity: Identity, frame: Frame, kind: str, sender: int, body: bytes) -> bytes:
    """Return the Ed25519 signature, 64 bytes, of a statement."""
    return identity.sign(statement(frame, kind, sender, body))


def seal_info(frame: Frame, advertised: bytes, sender: int, recipient: int) -> bytes:
    """Return the HKDF info of the key that seals ``sender``'s shares for ``recipient``."""
    return statement(frame, "seal", sender, encode(advertised, recipient))


def seed_info(frame: Frame, site: int) -> bytes:
    """Return the HKDF info of the mask that ``site`` makes from its seed."""
    return statement(frame, "seed", site, b"")


def pair_info(frame: Frame, mask_keys: Mapping[int, bytes], one: int, other: int) -> bytes:
    """Return the HKDF info of the mask that two sites share; it is equal at both sites."""
    low, high = sorted((one, other))
    keys = encode(high, mask_keys[low], mask_keys[high])
    return statement(frame, "pair", low, keys)


def check_bytes(value: object, size: int, what: str) -> bytes:
    """Return ``value``, which must be ``size`` bytes.

    Raises:
        StatementError: it is something else.
    """
    if type(value) is not bytes or len(value) != size:
        raise StatementError(f"{what} is not {size} bytes")
    return value


def _ascending(ids: Sequence[object]) -> bool:
    """Return whether ``ids`` is a tuple of different ints in ascending order."""
    return (
        type(ids) is tuple
        and all(type(site) is int for site in ids)
        and all(one < other for one, other in pairwise(ids))
    )


def advertisement_body(advertisement: Advertisement) -> bytes:
    """Return the bytes that an advertisement's signature covers beside the frame."""
    return encode(advertisement.mask_key, advertisement.seal_key, advertisement.commitment)


def check_advertisement(
    advertisement: Advertisement, frame: Frame, roster: Roster, cohort: Sequence[int]
) -> None:
    """Check sizes, membership and signature of one advertisement.

    Raises:
        StatementError: one of them is wrong; the error names the sender if it is in the cohort.
    """
    site = advertisement.site
    if type(site) is not int or site not in cohort:
        raise StatementError("an advertisement is not from a site of the cohort")
    with blame(site):
        check_bytes(advertisement.mask_key, KEY_BYTES, "a mask key")
        check_bytes(advertisement.seal_key, KEY_BYTES, "a sealing key")
        check_bytes(advertisement.commitment, DIGEST_BYTES, "a commitment")
        check_bytes(advertisement.signature, SIGNATURE_BYTES, "a signature")
        signed = statement(frame, "keys", site, advertisement_body(advertisement))
        verify(roster.keys[site], advertisement.signature, signed)


def check_advertisements(
    advertisements: Iterable[Advertisement], frame: Frame, roster: Roster, cohort: Sequence[int]
) -> dict[int, Advertisement]:
    """Check a round's advertisements, each and together; return them by site, ascending.

    Raises:
        StatementError: one is not valid, two are from one site, or two keys are equal.
    """
    found: dict[int, Advertisement] = {}
    keys: set[bytes] = set()
    for advertisement in advertisements:
        check_advertisement(advertisement, frame, roster, cohort)
        site = advertisement.site
        pair = {advertisement.mask_key, advertisement.seal_key}
        if site in found:
            raise StatementError("a site advertised twice", culprits=(site,))
        if len(pair) != 2 or pair & keys:
            raise StatementError("a site advertised a key that is not fresh", culprits=(site,))
        found[site] = advertisement
        keys |= pair
    return dict(sorted(found.items()))


def hash_advertisements(frame: Frame, advertisements: dict[int, Advertisement]) -> bytes:
    """Return the hash of U1 with all its keys: the graph's seed, and data of sealed shares."""
    bodies = (
        encode(site, advertisement_body(advertisement))
        for site, advertisement in sorted(advertisements.items())
    )
    return digest("advertised", frame.context, frame.round, frame.model, *bodies)


def check_survivors(survivors: Survivors, advertised: Iterable[int]) -> None:
    """Check that U3 is a subset of U2, and U2 of U1.

    Raises:
        StatementError: one is not a subset, or they are not ascending ids.
    """
    shared, masked = survivors.shared, survivors.masked
    if not (_ascending(shared) and _ascending(masked)):
        raise StatementError("survivors are not ascending ids")
    if not (set(masked) <= set(shared) <= set(advertised)):
        raise StatementError("survivors are not among those who advertised and shared")
    if len(survivors.signatures) != len(masked):
        raise StatementError("there is not one signature for each survivor")


def held_body(advertised: bytes, held: Iterable[int]) -> bytes:
    """Return what a masked input's signature covers: U1 (its hash), owners of the shares held."""
    return encode(advertised, *sorted(held))


def check_held(
    survivors: Survivors,
    site: int,
    holders: Iterable[int],
    frame: Frame,
    roster: Roster,
    advertised: bytes,
) -> None:
    """Check that ``site`` got the shares of all its ``holders`` in U2.

    Otherwise the site may share masks only with colluding or supposedly dropped sites. Opening its
    own mask would then reveal its update.

    Raises:
        StatementError: its signature covers something else.
    """
    signature = survivors.signatures[survivors.masked.index(site)]
    held = held_body(advertised, set(holders) & set(survivors.shared))
    with blame(site):
        check_bytes(signature, SIGNATURE_BYTES, "a signature")
        verify(roster.keys[site], signature, statement(frame, "masked", site, held))


def hash_survivors(advertised: bytes, survivors: Survivors) -> bytes:
    """Return the hash of U1 (its hash, ``advertised``), U2 and U3; CONFIRM signs it."""
    return digest("survivors", advertised, encode(*survivors.shared), encode(*survivors.masked))


def check_confirmation(
    confirmation: Confirmation, frame: Frame, roster: Roster, survivors: Survivors, agreed: bytes
) -> None:
    """Check one survivor's signature over ``agreed``, the hash of the survivors.

    Raises:
        StatementError: it is not from a survivor, or its signature does not cover this hash.
    """
    site = confirmation.site
    if type(site) is not int or site not in survivors.masked:
        raise StatementError("a confirmation is not from a survivor")
    with blame(site):
        check_bytes(confirmation.signature, SIGNATURE_BYTES, "a signature")
        verify(
            roster.keys[site],
            confirmation.signature,
            statement(frame, "confirm", site, agreed),
        )
