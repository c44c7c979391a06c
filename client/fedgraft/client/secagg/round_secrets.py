"""The secrets of one round of secure aggregation, and their form between two messages.

The secrets exist only in the memory of the site's processes. Flower keeps ``Memory`` in a node's
context from one message to the next; it is never written to a disk. Each round has fresh secrets.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NoReturn

from fedgraft.common.secagg.errors import StageError
from fedgraft.common.secagg.keys import Exchange, wipe
from fedgraft.common.secagg.statements import Advertisement, Survivors
from fedgraft.common.secagg.transcript import Frame, Parameters

__all__ = ["Memory", "PartyState", "RoundSecrets"]


class PartyState(IntEnum):
    """The last step of a site in a round; IDLE also after the end and after an abort."""

    IDLE = 0
    ADVERTISED = 1
    SHARED = 2
    READY = 3
    MASKED = 4
    CONFIRMED = 5


@dataclass(frozen=True)
class Memory:
    """A round between two messages, as plain values; ``parameters`` are the session's.

    Tuples of the same length belong together: ``neighbours`` with ``mask_keys`` and ``open_keys``,
    ``owners`` with ``shares``. Wiped secrets are all zeros.
    """

    parameters: Parameters
    state: int
    frame: Frame
    seed: bytes = field(repr=False)
    mask_private: bytes = field(repr=False)
    seal_private: bytes = field(repr=False)
    own: Advertisement
    advertised: tuple[int, ...]
    advertised_hash: bytes
    neighbours: tuple[int, ...]
    mask_keys: tuple[bytes, ...]
    open_keys: tuple[bytes, ...] = field(repr=False)
    owners: tuple[int, ...]
    shares: tuple[bytes, ...] = field(repr=False)
    survivors: Survivors


@dataclass(repr=False, eq=False)
class RoundSecrets:
    """All data of one round, secrets included; it is never printed, compared, copied or stored."""

    frame: Frame
    seed: bytearray
    mask_pair: Exchange
    seal_pair: Exchange
    own: Advertisement
    advertised: tuple[int, ...] = ()
    advertised_hash: bytes = b""
    mask_keys: dict[int, bytes] = field(default_factory=dict)  # of the neighbours
    open_keys: dict[int, bytes] = field(default_factory=dict)
    held: dict[int, bytearray] = field(default_factory=dict)
    survivors: Survivors = field(default_factory=lambda: Survivors((), (), ()))

    @classmethod
    def recall(cls, memory: Memory) -> "RoundSecrets":
        """Return the round that ``remember`` described."""
        neighbours = memory.neighbours
        return cls(
            memory.frame,
            bytearray(memory.seed),
            _exchange(memory.mask_private),
            _exchange(memory.seal_private),
            memory.own,
            memory.advertised,
            memory.advertised_hash,
            dict(zip(neighbours, memory.mask_keys, strict=True)),
            dict(zip(neighbours, memory.open_keys, strict=False)),  # empty after wiping
            dict(zip(memory.owners, map(bytearray, memory.shares), strict=True)),
            memory.survivors,
        )

    def remember(self, parameters: Parameters, state: PartyState) -> Memory:
        """Return the round as plain values, secrets included."""
        return Memory(
            parameters=parameters,
            state=int(state),
            frame=self.frame,
            seed=bytes(self.seed),
            mask_private=bytes(self.mask_pair.private),
            seal_private=bytes(self.seal_pair.private),
            own=self.own,
            advertised=self.advertised,
            advertised_hash=self.advertised_hash,
            neighbours=tuple(self.mask_keys),
            mask_keys=tuple(self.mask_keys.values()),
            open_keys=tuple(self.open_keys.values()),
            owners=tuple(self.held),
            shares=tuple(bytes(share) for share in self.held.values()),
            survivors=self.survivors,
        )

    def __getstate__(self) -> NoReturn:
        """Refuse to be pickled or copied: only ``remember`` takes secrets out."""
        raise StageError("the secrets of a round cannot be stored or copied")

    def wipe_masks(self) -> None:
        """Wipe the secrets of this site's own masks; shares held for others stay."""
        wipe(self.seed)
        self.mask_pair.wipe()
        self.seal_pair.wipe()
        self.open_keys.clear()

    def wipe(self) -> None:
        """Wipe every secret."""
        self.wipe_masks()
        for share in self.held.values():
            wipe(share)
        self.held.clear()


def _exchange(private: bytes) -> Exchange:
    """Return the key pair again; a wiped pair stays unusable."""
    pair = Exchange(private)
    if not any(private):
        pair.wipe()
    return pair
