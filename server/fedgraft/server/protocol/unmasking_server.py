"""The unmasking server: the coordinator's side of secure aggregation, as a state machine.

There is one object per round. Replies are added one by one while a stage is open. A bad reply is
refused with the id of its sender and changes nothing, so its site counts as dropped. Closing a
stage returns the next request, or ends the round if too few sites are left (Bonawitz et al. 2017,
figure 4).

Invariants: Masked inputs are added to one vector and not kept, so memory does not grow with the
number of sites. The sum is opened at most once, for the survivors that enough sites signed. An
``Aggregate`` exists only if every secret matched its advertisement and all check lanes hold.
"""

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.secagg.errors import (
    ParameterError,
    StageError,
    StatementError,
    TooFewParties,
    UnmaskError,
    blame,
)
from fedgraft.common.secagg.graph import Graph, GraphPlan, arrange
from fedgraft.common.secagg.keys import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    TAG_BYTES,
    Exchange,
    commit,
    derive,
    same,
    verify,
)
from fedgraft.common.secagg.masking import Mask, add_masks
from fedgraft.common.secagg.quantize import LANES, add_packed, read_lanes, signed
from fedgraft.common.secagg.shamir import BUDGET, recover
from fedgraft.common.secagg.statements import (
    Advertisement,
    Aggregate,
    Confirmation,
    Delivery,
    Envelope,
    KeysRequest,
    MaskedInput,
    Opening,
    SealedShares,
    SecAggStage,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.common.secagg.transcript import (
    Frame,
    Parameters,
    Policy,
    Roster,
    check_advertisement,
    check_bytes,
    check_confirmation,
    check_policy,
    context_hash,
    hash_advertisements,
    hash_survivors,
    held_body,
    pair_info,
    seed_info,
    statement,
)

__all__ = ["UnmaskingServer"]


class UnmaskingServer:
    """One round of one session.

    ``model`` is the hash of this round's work. Every ``add_`` raises ``StatementError`` for a
    refused reply, and ``StageError`` if its stage is not open. Every ``close_`` raises
    ``TooFewParties`` and ends the round if there are fewer sites than a threshold.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        policy: Policy,
        parameters: Parameters,
        round_number: int,
        model: bytes,
        threads: int = 1,
    ) -> None:
        check_policy(parameters, roster, policy)
        self._roster = roster
        self._parameters = parameters
        self._fewest = max(parameters.plan.fewest_survivors, policy.min_cohort)
        self._frame = Frame(context_hash(parameters, roster, policy), round_number, model)
        self._threads = threads
        self._probe = Exchange.generate()
        self._stage = SecAggStage.KEYS
        self._advertised: dict[int, Advertisement] = {}
        self._keys: set[bytes] = set()
        self._advertised_hash = b""
        self._plan: GraphPlan = parameters.plan
        self._graph = Graph((), 0)
        self._boxes: dict[int, list[Envelope]] = {}
        self._shared: set[int] = set()
        self._masked: dict[int, bytes] = {}
        self._total: NDArray[np.uint32] | None = None
        self._survivors = Survivors((), (), ())
        self._agreed = b""
        self._confirmed: dict[int, Confirmation] = {}
        self._openings: dict[int, tuple[tuple[int, ...], bytes]] = {}  # owners, their shares
        self._disputes: set[tuple[int, int]] = set()

    @property
    def stage(self) -> SecAggStage:
        """The open stage."""
        return self._stage

    def abort(self) -> None:
        """End the round and delete the collected inputs and shares."""
        self._stage = SecAggStage.OVER
        self._total = None
        self._boxes.clear()
        self._openings.clear()

    def _need(self, stage: SecAggStage) -> None:
        if self._stage is not stage:
            raise StageError(f"stage {stage.name} is not open, but {self._stage.name}")

    @contextmanager
    def _closing(self, stage: SecAggStage, then: SecAggStage) -> Iterator[None]:
        """Close ``stage`` and open ``then``; if closing fails, end the round."""
        self._need(stage)
        try:
            yield
        except BaseException:
            self.abort()
            raise
        self._stage = then

    def keys_request(self) -> KeysRequest:
        """Return the KEYS request for every site of the cohort."""
        self._need(SecAggStage.KEYS)
        return KeysRequest(self._frame.round, self._frame.context, self._frame.model)

    def add_advertisement(self, advertisement: Advertisement) -> None:
        """Add a site's keys; keys that would make an honest site fail later are refused, too."""
        self._need(SecAggStage.KEYS)
        cohort = self._parameters.cohort
        check_advertisement(advertisement, self._frame, self._roster, cohort)
        site = advertisement.site
        with blame(site):
            if site in self._advertised:
                raise StatementError("advertised twice")
            pair = {advertisement.mask_key, advertisement.seal_key}
            if len(pair) != 2 or pair & self._keys:
                raise StatementError("advertised a key that is not fresh")
            for key in pair:
                self._probe.agree(key)  # a key of small order would make honest neighbours abort
        self._keys |= pair
        self._advertised[site] = advertisement

    def close_keys(self) -> SharesRequest:
        """Close KEYS; return all advertisements (U1), for every site that sent one."""
        with self._closing(SecAggStage.KEYS, SecAggStage.SHARES):
            if len(self._advertised) < self._fewest:
                raise TooFewParties(f"only {len(self._advertised)} of {self._fewest} sites")
            self._advertised = dict(sorted(self._advertised.items()))
            self._advertised_hash = hash_advertisements(self._frame, self._advertised)
            self._plan = self._parameters.plan.among(len(self._advertised))
            self._graph = arrange(self._advertised, self._advertised_hash, self._plan.degree)
            return SharesRequest(tuple(self._advertised.values()))

    def add_shares(self, shares: SealedShares) -> None:
        """Add a site's envelopes: exactly one for each of its neighbours."""
        self._need(SecAggStage.SHARES)
        site = self._member(shares.site, self._advertised)
        with blame(site):
            if site in self._shared:
                raise StatementError("shared twice")
            recipients = [envelope.recipient for envelope in shares.envelopes]
            if any(type(recipient) is not int for recipient in recipients) or tuple(
                sorted(recipients)
            ) != self._graph.neighbours(site):
                raise StatementError("its envelopes are not for its neighbours")
            for envelope in shares.envelopes:
                if type(envelope.sender) is not int or envelope.sender != site:
                    raise StatementError("an envelope has another sender")
                check_bytes(envelope.ciphertext, 2 * KEY_BYTES + TAG_BYTES, "a sealed share")
        self._shared.add(site)
        for envelope in shares.envelopes:
            self._boxes.setdefault(envelope.recipient, []).append(envelope)

    def close_shares(self) -> dict[int, Delivery]:
        """Close SHARES; return, for every site that shared (U2), the envelopes addressed to it."""
        with self._closing(SecAggStage.SHARES, SecAggStage.TRAIN):
            if len(self._shared) < self._fewest:
                raise TooFewParties(f"only {len(self._shared)} of {self._fewest} sites shared")
            boxes = {site: Delivery(tuple(self._boxes.get(site, ()))) for site in self._shared}
            self._boxes.clear()
            self._total = np.zeros(LANES + self._parameters.length, np.uint32)
            return dict(sorted(boxes.items()))

    def add_masked(self, masked: MaskedInput) -> None:
        """Add a masked input to the sum; it is not kept."""
        self._need(SecAggStage.TRAIN)
        site = self._member(masked.site, self._shared)
        assert self._total is not None  # noqa: S101  # set when SHARES closed
        with blame(site):
            if site in self._masked:
                raise StatementError("sent a masked input twice")
            if not isinstance(masked.packed, np.ndarray):
                raise StatementError("a masked input is not an array")
            check_bytes(masked.signature, SIGNATURE_BYTES, "a signature")
            given = held_body(self._advertised_hash, self._held(site))
            signed_body = statement(self._frame, "masked", site, given)
            verify(self._roster.keys[site], masked.signature, signed_body)
            try:
                add_packed(self._total, masked.packed, self._parameters.coding.ring_bits)
            except ParameterError as error:
                raise StatementError(str(error)) from None
        self._masked[site] = masked.signature

    def close_training(self) -> Survivors:
        """Close TRAIN; return the sites that shared and those in the sum (U2 and U3), to sign."""
        with self._closing(SecAggStage.TRAIN, SecAggStage.CONFIRM):
            if len(self._masked) < self._fewest:
                raise TooFewParties(f"only {len(self._masked)} of {self._fewest} sites survived")
            self._survivors = Survivors(
                tuple(sorted(self._shared)),
                tuple(sorted(self._masked)),
                tuple(signature for _, signature in sorted(self._masked.items())),
            )
            self._agreed = hash_survivors(self._advertised_hash, self._survivors)
            return self._survivors

    def add_confirmation(self, confirmation: Confirmation) -> None:
        """Add a survivor's signature over the survivors."""
        self._need(SecAggStage.CONFIRM)
        check_confirmation(confirmation, self._frame, self._roster, self._survivors, self._agreed)
        if confirmation.site in self._confirmed:
            raise StatementError("a site confirmed twice", culprits=(confirmation.site,))
        self._confirmed[confirmation.site] = confirmation

    def close_confirm(self) -> UnmaskRequest:
        """Close CONFIRM; return the required number of signatures, for all sites that signed."""
        with self._closing(SecAggStage.CONFIRM, SecAggStage.UNMASK):
            fewest = self._plan.sign_threshold
            if len(self._confirmed) < fewest:
                raise TooFewParties(f"only {len(self._confirmed)} of {fewest} sites confirmed")
            return UnmaskRequest(tuple(self._confirmed.values())[:fewest])

    def add_opening(self, opening: Opening) -> None:
        """Add a site's shares: one of each of its neighbours in U2 and one of itself."""
        self._need(SecAggStage.UNMASK)
        site = self._member(opening.site, self._confirmed)
        with blame(site):
            if site in self._openings:
                raise StatementError("opened twice")
            shares: dict[int, bytes] = {}
            for revealed in opening.shares:
                if revealed.owner in shares:
                    raise StatementError("two shares of one owner")
                shares[revealed.owner] = check_bytes(revealed.share, KEY_BYTES, "a share")
            if set(shares) != self._held(site):
                raise StatementError("its shares are not those of its neighbours")
        owners = tuple(sorted(shares))
        self._openings[site] = owners, b"".join(shares[owner] for owner in owners)

    def finish(self) -> Aggregate:
        """Open the sum and return it.

        Raises:
            TooFewParties: an owner has fewer than ``share_threshold`` shares.
            UnmaskError: a secret cannot be recovered, or the sum fails its checks. Then there is no
                output, and ``culprits`` names the sites that the failure points at, if known.
        """
        with self._closing(SecAggStage.UNMASK, SecAggStage.OVER):
            total, self._total = self._total, None
            assert total is not None  # noqa: S101  # set when SHARES closed
            masks = [mask for owner in sorted(self._shared) for mask in self._masks_of(owner)]
            self._openings.clear()
            add_masks(total, masks, threads=self._threads)
            return self._read(total)

    def _masks_of(self, owner: int) -> Iterator[Mask]:
        """Yield the masks that ``owner`` left in the sum, with the sign that removes them."""
        advertisement = self._advertised[owner]
        if owner in self._masked:
            seed = self._recover(
                owner, lambda secret: same(commit(secret), advertisement.commitment)
            )
            yield Mask(derive(seed, seed_info(self._frame, owner)), -1)
            return
        private = self._recover(
            owner, lambda secret: same(Exchange(secret).public, advertisement.mask_key)
        )
        pair = Exchange(private)
        keys = {site: said.mask_key for site, said in self._advertised.items()}
        for other in self._graph.neighbours(owner):
            if other in self._masked:
                agreed = pair.agree(keys[other])
                key = derive(agreed, pair_info(self._frame, keys, owner, other))
                yield Mask(key, 1 if owner < other else -1)
        pair.wipe()

    def _recover(self, owner: int, accept: Callable[[bytes], bool]) -> bytes:
        holders = [site for site in self._graph.holders(owner) if site in self._openings]
        wrong_before = {holder for _, holder in self._disputes}
        holders.sort(key=lambda site: site in wrong_before)  # these holders come last
        threshold = self._plan.share_threshold
        if len(holders) < threshold:
            raise TooFewParties(f"only {len(holders)} of {threshold} shares of site {owner}")
        points = [holder + 1 for holder in holders]
        shares = [self._share(holder, owner) for holder in holders]
        found = recover(points, shares, threshold, accept)
        if found is None:
            # If t holders are honest and recover tried all combinations, only the owner can have
            # sent wrong values.
            honest = len(holders) - self._parameters.colluders
            sure = honest >= threshold and math.comb(len(holders), threshold) <= BUDGET
            raise UnmaskError(
                f"no {threshold} shares of site {owner} agree with what it advertised",
                culprits=(owner,) if sure else (),
            )
        self._disputes |= {(owner, point - 1) for point in found.wrong}
        return found.secret

    def _share(self, holder: int, owner: int) -> bytes:
        owners, shares = self._openings[holder]
        start = KEY_BYTES * owners.index(owner)
        return shares[start : start + KEY_BYTES]

    def _read(self, total: NDArray[np.uint32]) -> Aggregate:
        coding, count = self._parameters.coding, len(self._masked)
        lanes = read_lanes(total, coding)
        if not lanes.intact or lanes.count != count:
            raise UnmaskError("the check lanes do not hold: a site sent a malformed input")
        if not count <= lanes.weight <= count * coding.max_weight:
            raise UnmaskError("the sum of weights is impossible: a site sent a malformed input")
        sums = signed(total[LANES:], coding.ring_bits)
        limit = count * coding.levels
        if sums.size and not (-limit <= int(sums.min()) and int(sums.max()) <= limit):
            raise UnmaskError("the sum is out of range: a site sent a malformed input")
        return Aggregate(
            survivors=self._survivors.masked,
            weight=lanes.weight,
            metrics=lanes.metrics,
            sums=sums,
            disputes=tuple(sorted(self._disputes)),
        )

    def _held(self, site: int) -> set[int]:
        """Return the owners whose shares ``site`` holds: its neighbours in U2, and itself."""
        return set(self._graph.holders(site)) & self._shared

    @staticmethod
    def _member(site: object, members: Container[int]) -> int:
        if type(site) is not int or site not in members:
            raise StatementError("a reply is from a site that is not in this stage")
        return site
