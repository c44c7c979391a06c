"""One whole round of secure aggregation in this process, with a meter on every stage.

Real parties and a real coordinator, no network, no training: ``play`` measures CPU seconds,
``replay`` the coordinator's memory, ``aes_rate`` the floor under both. Updates are drawn when a
site needs one and never kept, so the process holds one at a time whatever the number of sites.
"""

import hashlib
import os
import pickle
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedgraft.client.secagg.masking_party import MaskingParty
from fedgraft.common.console import Steps
from fedgraft.common.errors import InputError
from fedgraft.common.secagg.errors import SecAggError
from fedgraft.common.secagg.keys import Identity
from fedgraft.common.secagg.quantize import LANES, default_coding, encode_update, mean
from fedgraft.common.secagg.transcript import Parameters, Policy, Roster, hash_adapter, hash_model
from fedgraft.server.protocol.unmasking_server import UnmaskingServer

__all__ = ["Federation", "Meter", "Pass", "aes_rate", "federate", "play", "replay"]

CLIP, MOST_WEIGHT, METRICS = 0.05, 1000, (1.25,)
AES_BYTES = 1 << 29  # a thread: long enough for a steady rate
MODEL = hash_model(hash_adapter(np.zeros(1, np.float32)), b"")


@dataclass(frozen=True)
class Federation:
    """One session: what all parties agree on, and the sites' keys."""

    parameters: Parameters
    dropped: int
    threads: int
    seed: int
    identities: tuple[Identity, ...]
    roster: Roster
    policy: Policy = field(default_factory=lambda: Policy(1, 3, 16, 1.0))

    @property
    def sites(self) -> range:
        """Ids of all sites; the first ``dropped`` of them drop."""
        return range(len(self.identities))

    def open_site(self, site: int) -> MaskingParty:
        """A site that never served a round, and whose memory of this one need not last."""
        return MaskingParty(
            site=site,
            identity=self.identities[site],
            roster=self.roster,
            policy=self.policy,
            parameters=self.parameters,
            claim=lambda *_: None,
            pledge=lambda *_: None,
            threads=self.threads,
        )

    def open_server(self) -> UnmaskingServer:
        """The coordinator of the first round."""
        return UnmaskingServer(
            roster=self.roster,
            policy=self.policy,
            parameters=self.parameters,
            round_number=1,
            model=MODEL,
            threads=self.threads,
        )

    def contribution(self, site: int) -> tuple[NDArray[np.float32], int, np.random.Generator]:
        """A site's update, its weight and what decides its rounding: the same at every call."""
        draw = np.random.default_rng([self.seed, site])
        weight = int(draw.integers(100, MOST_WEIGHT))
        update = draw.standard_normal(self.parameters.length, np.float32)
        update *= 0.01
        return update, weight, draw


def federate(
    sites: int, length: int, dropout: float, colluders: float, threads: int, seed: int
) -> Federation:
    """A federation of fresh keys; ``dropout`` and ``colluders`` are fractions.

    Raises:
        InputError: numbers that cannot work, or not together.
    """
    if not (0 <= dropout < 1 and 0 <= colluders < 1):
        raise InputError(
            "--dropout and --colluders are fractions", hint="give a number from 0 to below 1"
        )
    if min(sites, length, threads) < 1 or seed < 0:
        raise InputError(
            "--sites, --parameters and --threads must be positive",
            hint="give at least 3 sites, one parameter and one thread, and a seed from 0",
        )
    dropped = round(dropout * sites)
    try:
        parameters = Parameters(
            session=os.urandom(16),
            cohort=tuple(range(sites)),
            layout=hashlib.sha256(b"benchmark").digest(),
            length=length,
            colluders=max(1, int(colluders * sites)),
            dropouts=dropped,
            coding=default_coding(sites, CLIP),
        )
    except SecAggError as error:
        hint = "change --sites, --dropout or --colluders"
        raise InputError(str(error), hint=hint) from None
    identities = tuple(Identity.generate() for _ in range(sites))
    roster = Roster(tuple(identity.public for identity in identities))
    return Federation(parameters, dropped, threads, seed, identities, roster)


@dataclass
class Meter:
    """CPU seconds of this process by stage, and how often the stage was entered."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what happens inside to ``stage``."""
        start = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - start
        self.calls[stage] += 1

    def means(self) -> dict[str, float]:
        """CPU seconds a call, by stage."""
        return {stage: total / self.calls[stage] for stage, total in self.seconds.items()}


@dataclass
class Pass:
    """What one measured round cost, and whether its sum was right."""

    client: Meter = field(default_factory=Meter)
    coordinator: Meter = field(default_factory=Meter)
    upload: int = 0
    masks: int = 0
    unmask_wall: float = 0.0
    exact: bool = False


def play(federation: Federation, steps: Steps, tape: BinaryIO | None = None) -> Pass:
    """One measured round; every message to the coordinator also goes to ``tape``."""
    run = Pass()
    client, coordinator = run.client, run.coordinator

    def send(stage: str, add: Callable[[Any], None], message: Any) -> None:
        with coordinator(stage):
            add(message)
        if tape:
            pickle.dump(message, tape, pickle.HIGHEST_PROTOCOL)

    parties = {site: federation.open_site(site) for site in federation.sites}
    with coordinator("keys"):
        server = federation.open_server()
        keys_request = server.keys_request()
    for party in parties.values():
        with client("advertise"):
            advertisement = party.advertise(keys_request)
        send("keys", server.add_advertisement, advertisement)
    with coordinator("keys"):
        shares_request = server.close_keys()
    steps.done("keys")
    for party in parties.values():
        with client("share"):
            shares = party.share(shares_request)
        send("shares", server.add_shares, shares)
    with coordinator("shares"):
        deliveries = server.close_shares()
    steps.done("shares")
    for site in federation.sites[: federation.dropped]:
        parties.pop(site).abort()
    expected = np.zeros(federation.parameters.length, np.int64)
    for site, party in parties.items():
        update, weight, rounding = federation.contribution(site)
        with client("accept"):
            party.accept(deliveries.pop(site), MODEL)
        with client("mask"):
            masked = party.mask(update, weight, METRICS, rounding)
        run.upload = masked.packed.nbytes
        send("adding", server.add_masked, masked)
        del masked
        update, weight, rounding = federation.contribution(site)
        coding = federation.parameters.coding
        clear = encode_update(update, weight, METRICS, coding, rounding)[LANES:]
        expected += clear.view(np.int32)
    with coordinator("adding"):
        survivors = server.close_training()
    steps.done("masked inputs")
    for party in parties.values():
        with client("confirm"):
            confirmation = party.confirm(survivors)
        send("confirm", server.add_confirmation, confirmation)
    with coordinator("confirm"):
        unmask_request = server.close_confirm()
    steps.done("confirmations")
    revealed: Counter[int] = Counter()
    for party in parties.values():
        with client("unmask"):
            opening = party.unmask(unmask_request)
        send("unmasking", server.add_opening, opening)
        revealed.update(share.owner for share in opening.shares)
    wall = time.perf_counter()
    with coordinator("unmasking"):
        result = server.finish()
    run.unmask_wall = time.perf_counter() - wall
    run.exact = result.survivors == tuple(parties) and np.array_equal(result.sums, expected)
    with coordinator("mean"):
        mean(result.sums, result.weight, federation.parameters.coding)
    steps.done("unmasked")
    # A survivor leaves the mask of its seed; a dropout one for every survivor that holds a share.
    gone = set(federation.sites[: federation.dropped])
    run.masks = len(parties) + sum(revealed[owner] for owner in gone)
    return run


def replay(federation: Federation, tape: BinaryIO) -> tuple[int, int]:
    """Peak bytes of a coordinator that is sent what ``tape`` holds: unmasking, and the mean."""
    everyone, left = len(federation.sites), len(federation.sites) - federation.dropped
    tape.seek(0)
    tracemalloc.start()
    server = federation.open_server()

    def receive(count: int, add: Callable[[Any], None]) -> None:
        for _ in range(count):
            add(pickle.load(tape))

    receive(everyone, server.add_advertisement)
    server.close_keys()
    receive(everyone, server.add_shares)
    server.close_shares()
    tracemalloc.reset_peak()
    receive(left, server.add_masked)
    server.close_training()
    receive(left, server.add_confirmation)
    server.close_confirm()
    receive(left, server.add_opening)
    result = server.finish()
    opened = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    mean(result.sums, result.weight, federation.parameters.coding)
    decoded = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return opened, decoded


def aes_rate(words: int, threads: int) -> float:
    """Bytes per CPU second of AES-256-CTR alone, ``words`` uint32 a call in each thread."""

    def work(_: int) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        zeros, target = bytes(4 * words), bytearray(4 * words + 16)
        for _ in range(calls):
            cipher.update_into(zeros, target)

    calls = -(-AES_BYTES // (4 * words))
    with ThreadPoolExecutor(threads) as pool:
        start = time.process_time()
        list(pool.map(work, range(threads)))
        return threads * calls * 4 * words / (time.process_time() - start)
