"""The masking party: one site's side of secure aggregation, as a state machine.

KEYS -> SHARES -> TRAIN -> CONFIRM -> UNMASK, each once per round and in this order (Bonawitz et al.
2017, figure 4, active variant). Every method checks what the coordinator says *before* it answers.
After any error, the secrets of the round are wiped, and the site abstains until a later round.

Invariants: no stage of a round is served twice, not even after a restart or by processes that run
at the same time (``claim``). So at most one survivor set is signed per round, and a share of at
most one of a neighbour's two secrets is ever revealed. The update leaves this object only under the
site's own mask and the masks that the site shares with its neighbours.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.secagg.round_secrets import Memory, PartyState, RoundSecrets
from fedgraft.common.secagg.errors import (
    InputRefused,
    ParameterError,
    PolicyRefused,
    StageError,
    StatementError,
    TooFewParties,
    blame,
)
from fedgraft.common.secagg.graph import Graph, GraphPlan, arrange
from fedgraft.common.secagg.keys import (
    KEY_BYTES,
    TAG_BYTES,
    Entropy,
    Exchange,
    Identity,
    commit,
    derive,
    draw,
    open_sealed,
    same,
    seal,
    wipe,
)
from fedgraft.common.secagg.masking import Mask, add_masks
from fedgraft.common.secagg.quantize import encode_update, pack
from fedgraft.common.secagg.shamir import split
from fedgraft.common.secagg.statements import (
    Advertisement,
    Confirmation,
    Delivery,
    Envelope,
    KeysRequest,
    MaskedInput,
    Opening,
    RevealedShare,
    SealedShares,
    SecAggStage,
    SharesRequest,
    Survivors,
    UnmaskRequest,
)
from fedgraft.common.secagg.transcript import (
    DIGEST_BYTES,
    Frame,
    Parameters,
    Policy,
    Roster,
    advertisement_body,
    check_advertisements,
    check_bytes,
    check_confirmation,
    check_held,
    check_policy,
    check_survivors,
    context_hash,
    digest,
    encode,
    hash_advertisements,
    hash_survivors,
    held_body,
    pair_info,
    seal_info,
    seed_info,
    sign,
)

__all__ = ["MaskingParty"]


class MaskingParty:
    """One site in one session.

    ``roster`` and ``policy`` are the site's own files. ``claim(round, stage)`` is called before a
    stage is answered. It raises ``StageError`` unless the stage is later than everything that this
    site ever claimed in the session; the claim is durable when it returns. ``pledge(model, sum)``
    is called before survivors are confirmed. It raises ``StageError`` if this site ever, in any
    session, confirmed another sum of the same work: the difference of the two could be the input
    of one site. ``memory`` is the result of ``remember`` after the stage before. ``entropy`` is the
    source of all secrets.
    """

    def __init__(
        self,
        *,
        site: int,
        identity: Identity,
        roster: Roster,
        policy: Policy,
        parameters: Parameters,
        claim: Callable[[int, SecAggStage], None],
        pledge: Callable[[bytes, bytes], None],
        memory: Memory | None = None,
        entropy: Entropy = os.urandom,
        threads: int = 1,
    ) -> None:
        if not 0 <= site < len(roster.keys) or not same(roster.keys[site], identity.public):
            raise ParameterError("the roster has another key for this site")
        if memory is not None and memory.parameters != parameters:
            raise ParameterError("the memory is of a round with other parameters")
        self._site = site
        self._identity = identity
        self._roster = roster
        self._policy = policy
        self._parameters = parameters
        self._claim = claim
        self._pledge = pledge
        self._entropy = entropy
        self._threads = threads
        self._state = PartyState(memory.state) if memory else PartyState.IDLE
        self._round = RoundSecrets.recall(memory) if memory else None

    @property
    def parameters(self) -> Parameters:
        """The session's parameters."""
        return self._parameters

    @property
    def state(self) -> PartyState:
        """The last step of this site in the round."""
        return self._state

    def remember(self) -> Memory | None:
        """Return the memory for the next stage, secrets included; None if no round is under way.

        Raises:
            StageError: between ``accept`` and ``mask``: with a copy of the memory, a second input
                could be masked with the same masks.
        """
        now = self._round
        if self._state is PartyState.READY:
            raise StageError("a round is not interrupted while it trains")
        return now.remember(self._parameters, self._state) if now is not None else None

    def abort(self) -> None:
        """Wipe the round; call this if the coordinator has been silent for too long."""
        if self._round is not None:
            self._round.wipe()
        self._round = None
        self._state = PartyState.IDLE

    def __getstate__(self) -> NoReturn:
        """Refuse to be pickled or copied: secrets stay in this process."""
        raise StageError("a masking party cannot be stored or copied")

    @contextmanager
    def _stage(
        self, needed: PartyState, then: PartyState, stage: SecAggStage | None = None
    ) -> Iterator[RoundSecrets]:
        """Run one step in order, and claim it if it begins a stage; an error wipes the round."""
        try:
            if self._state is not needed or self._round is None:
                raise StageError(f"a round in state {self._state.name} is not {needed.name}")
            if stage is not None:
                self._claim(self._round.frame.round, stage)
            yield self._round
        except BaseException:
            self.abort()
            raise
        self._state = then

    def advertise(self, request: KeysRequest) -> Advertisement:
        """KEYS: begin a round with fresh keys; wipe a round that is still under way.

        Raises:
            PolicyRefused: the parameters are below the policy's floor, the context is not the
                agreed one, or this site is not in the cohort.
            StageError: the round is not later than every round ever served in the session.
            StatementError: the request is malformed.
        """
        self.abort()
        check_policy(self._parameters, self._roster, self._policy)
        if self._site not in self._parameters.cohort:
            raise PolicyRefused("this site is not in the cohort")
        context = context_hash(self._parameters, self._roster, self._policy)
        if not same(check_bytes(request.context, DIGEST_BYTES, "a context"), context):
            raise PolicyRefused("the coordinator has other parameters than this site")
        check_bytes(request.model, DIGEST_BYTES, "a model hash")
        if type(request.round) is not int or not request.round < 1 << 63:
            raise StatementError("a round is not a 64-bit number")
        self._claim(request.round, SecAggStage.KEYS)
        frame = Frame(context, request.round, request.model)
        seed = draw(self._entropy, KEY_BYTES)
        pairs = Exchange.generate(self._entropy), Exchange.generate(self._entropy)
        unsigned = Advertisement(self._site, pairs[0].public, pairs[1].public, commit(seed), b"")
        signature = sign(self._identity, frame, "keys", self._site, advertisement_body(unsigned))
        own = replace(unsigned, signature=signature)
        self._round, self._state = RoundSecrets(frame, seed, *pairs, own), PartyState.ADVERTISED
        return own

    def share(self, request: SharesRequest) -> SealedShares:
        """SHARES: check all keys, then seal shares of seed and mask key for the neighbours.

        Raises:
            StatementError: an id, key or signature is not valid, or our own entry was changed.
            TooFewParties: fewer sites advertised keys than must sign later.
        """
        with self._stage(PartyState.ADVERTISED, PartyState.SHARED, SecAggStage.SHARES) as now:
            found = check_advertisements(
                request.advertisements, now.frame, self._roster, self._parameters.cohort
            )
            if found.get(self._site) != now.own:
                raise StatementError("our own advertisement was changed or left out")
            if len(found) < self._parameters.plan.sign_threshold:
                raise TooFewParties(f"only {len(found)} sites advertised keys")
            now.advertised = tuple(found)
            now.advertised_hash = hash_advertisements(now.frame, found)
            neighbours = [found[other] for other in self._graph(now).neighbours(self._site)]
            now.mask_keys = {other.site: other.mask_key for other in neighbours}
            return SealedShares(self._site, self._seal_shares(now, neighbours))

    def _plan(self, now: RoundSecrets) -> GraphPlan:
        """Return degree and thresholds for the sites that advertised keys."""
        return self._parameters.plan.among(len(now.advertised))

    def _graph(self, now: RoundSecrets) -> Graph:
        """Return the graph of the sites that share secrets with each other."""
        return arrange(now.advertised, now.advertised_hash, self._plan(now).degree)

    def _seal_shares(
        self, now: RoundSecrets, neighbours: list[Advertisement]
    ) -> tuple[Envelope, ...]:
        seal_keys = {other.site: other.seal_key for other in neighbours}
        threshold, holders = self._plan(now).share_threshold, sorted((self._site, *seal_keys))
        secret = now.seed + now.mask_pair.private
        points = [holder + 1 for holder in holders]
        shares = dict(zip(holders, split(secret, threshold, points, self._entropy), strict=True))
        wipe(secret)
        now.held[self._site] = shares.pop(self._site)
        envelopes = []
        for other, share in shares.items():
            with blame(other):
                agreed = now.seal_pair.agree(seal_keys[other])
            there, back = (
                derive(agreed, seal_info(now.frame, now.advertised_hash, *way))
                for way in ((self._site, other), (other, self._site))
            )
            now.open_keys[other] = back
            sealed = seal(there, bytes(share), now.advertised_hash)
            wipe(share)
            envelopes.append(Envelope(self._site, other, sealed))
        return tuple(envelopes)

    def accept(self, delivery: Delivery, model: bytes) -> None:
        """TRAIN, before training: open the neighbours' envelopes.

        ``model`` is the hash of the work that we were sent.

        Raises:
            StatementError: ``model`` is not the one that we advertised for, or an envelope is not
                from a neighbour, not for us, not authentic, or there twice.
            TooFewParties: there are fewer shares than are needed to open a secret.
        """
        with self._stage(PartyState.SHARED, PartyState.READY, SecAggStage.TRAIN) as now:
            if not same(check_bytes(model, DIGEST_BYTES, "a model hash"), now.frame.model):
                raise StatementError("the model is not the one that all sites signed for")
            for envelope in delivery.envelopes:
                sender = envelope.sender
                if type(sender) is not int or sender not in now.mask_keys:
                    raise StatementError("an envelope is not from a neighbour")
                if envelope.recipient != self._site or sender in now.held:
                    raise StatementError("an envelope is not for us, or is there twice")
                with blame(sender):
                    sealed = check_bytes(
                        envelope.ciphertext, 2 * KEY_BYTES + TAG_BYTES, "a sealed share"
                    )
                    now.held[sender] = open_sealed(
                        now.open_keys[sender], sealed, now.advertised_hash
                    )
            if len(now.held) < self._plan(now).share_threshold:
                raise TooFewParties(f"only {len(now.held)} neighbours shared their secrets")

    def mask(
        self,
        update: NDArray[np.floating],
        weight: int,
        metrics: tuple[float, ...],
        generator: np.random.Generator | None,
    ) -> MaskedInput:
        """TRAIN, after training: quantise, mask and pack ``update`` (float [length]).

        ``metrics`` are at most two numbers to be summed over sites. ``generator`` draws the
        rounding; it is None if ``update`` has whole levels only.

        Raises:
            InputRefused: ``update`` is not finite, out of range, or of another length.
            StatementError: a neighbour's mask key cannot be used.
        """
        with self._stage(PartyState.READY, PartyState.MASKED) as now:
            if update.shape != (self._parameters.length,):
                raise InputRefused("the update has another length than the layout")
            coding = self._parameters.coding
            vector = encode_update(update, weight, metrics, coding, generator)
            mask_keys = {self._site: now.mask_pair.public, **now.mask_keys}
            masks = [Mask(derive(now.seed, seed_info(now.frame, self._site)), 1)]
            for other in sorted(set(now.held) - {self._site}):
                with blame(other):
                    agreed = now.mask_pair.agree(mask_keys[other])
                key = derive(agreed, pair_info(now.frame, mask_keys, self._site, other))
                masks.append(Mask(key, 1 if self._site < other else -1))
            add_masks(vector, masks, threads=self._threads)
            packed = pack(vector, coding.ring_bits)
            now.wipe_masks()
            given = held_body(now.advertised_hash, now.held)
            signature = sign(self._identity, now.frame, "masked", self._site, given)
            return MaskedInput(self._site, packed, signature)

    def confirm(self, survivors: Survivors) -> Confirmation:
        """CONFIRM: sign the survivors, once.

        Raises:
            StatementError: the survivor lists are not nested (U3 in U2 in U1), do not contain this
                site, or contradict the shares that this site received.
            TooFewParties: fewer survivors than the signatures, the two honest parties or the policy
                need.
        """
        with self._stage(PartyState.MASKED, PartyState.CONFIRMED, SecAggStage.CONFIRM) as now:
            check_survivors(survivors, now.advertised)
            if self._site not in survivors.masked:
                raise StatementError("our own input was left out")
            if set(survivors.shared) & {self._site, *now.mask_keys} != set(now.held):
                raise StatementError("we were given other shares than the coordinator says")
            fewest = max(self._parameters.plan.fewest_survivors, self._policy.min_cohort)
            if len(survivors.masked) < fewest:
                raise TooFewParties(f"only {len(survivors.masked)} of {fewest} sites survived")
            graph = self._graph(now)
            for other in sorted(set(now.held) & set(survivors.masked) - {self._site}):
                check_held(
                    survivors,
                    other,
                    graph.holders(other),
                    now.frame,
                    self._roster,
                    now.advertised_hash,
                )
            agreed = hash_survivors(now.advertised_hash, survivors)
            total = digest("sum", self._roster.hash, encode(*survivors.masked))
            self._pledge(now.frame.model, total)
            now.survivors = replace(survivors, signatures=())
            return Confirmation(
                self._site, sign(self._identity, now.frame, "confirm", self._site, agreed)
            )

    def unmask(self, request: UnmaskRequest) -> Opening:
        """UNMASK: reveal one share of each neighbour, then wipe everything.

        Raises:
            StatementError: a confirmation is not valid, or a site sent two.
            TooFewParties: fewer sites confirmed than must agree.
        """
        with self._stage(PartyState.CONFIRMED, PartyState.IDLE, SecAggStage.UNMASK) as now:
            agreed = hash_survivors(now.advertised_hash, now.survivors)
            signers = set()
            for confirmation in request.confirmations:
                check_confirmation(confirmation, now.frame, self._roster, now.survivors, agreed)
                if confirmation.site in signers:
                    raise StatementError("a site confirmed twice", culprits=(confirmation.site,))
                signers.add(confirmation.site)
            if len(signers) < self._parameters.plan.sign_threshold:
                raise TooFewParties(f"only {len(signers)} sites confirmed the survivors")
            alive = set(now.survivors.masked)
            shares = tuple(
                RevealedShare(
                    owner, bytes(both[:KEY_BYTES] if owner in alive else both[KEY_BYTES:])
                )
                for owner, both in sorted(now.held.items())
            )
        self.abort()
        return Opening(self._site, shares)
