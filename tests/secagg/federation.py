"""A federation in memory: real parties, and a coordinator whose messages a test can bend."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.secagg.masking_party import MaskingParty
from fedgraft.common.secagg.errors import SecAggError, StageError
from fedgraft.common.secagg.keys import Entropy, Identity
from fedgraft.common.secagg.quantize import Coding
from fedgraft.common.secagg.statements import Aggregate, SecAggStage, Survivors, UnmaskRequest
from fedgraft.common.secagg.transcript import Parameters, Policy, Roster, hash_adapter, hash_model
from fedgraft.server.protocol.unmasking_server import UnmaskingServer

STAGES = ("keys", "shares", "train", "confirm", "unmask")
ADAPTER = hash_adapter(np.arange(3, dtype=np.float32))
MODEL = hash_model(ADAPTER, b"settings")  # of round 1
SESSION = bytes(range(16))


def stream(label: str) -> Entropy:
    """Fixed bytes for tests: SHA-256 of a label and a counter."""
    count = 0

    def entropy(size: int) -> bytes:
        nonlocal count
        out = b""
        while len(out) < size:
            out += hashlib.sha256(f"{label}:{count}".encode()).digest()
            count += 1
        return out[:size]

    return entropy


def coding_for(n: int, **changes: Any) -> Coding:
    return Coding(**({"parties": n, "clip": 0.5, "max_weight": 1000} | changes))


def parameters_for(n: int, length: int, /, **changes: Any) -> Parameters:
    base: dict[str, Any] = {
        "session": SESSION,
        "cohort": tuple(range(n)),
        "layout": hashlib.sha256(b"layout").digest(),
        "length": length,
        "colluders": 1,
        "dropouts": 0,
    }
    if "coding" not in changes:
        base["coding"] = coding_for(n)
    return Parameters(**(base | changes))


@dataclass
class Federation:
    """``n`` sites with updates and weights; ``entropy`` fixes all their secrets."""

    n: int
    length: int = 5
    parameters: Parameters | None = None
    policy: Policy = field(default_factory=lambda: Policy(1, 3, 16, 1.0))
    fixed: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.parameters is None:
            self.parameters = parameters_for(self.n, self.length)
        self.identities = [Identity.generate(stream(f"identity {i}")) for i in range(self.n)]
        self.roster = Roster(tuple(identity.public for identity in self.identities))
        self.pledges: dict[tuple[int, bytes], bytes] = {}
        self.claims: dict[int, tuple[int, int]] = {}
        self.sites = {site: self.open_site(site) for site in self.settings.cohort}
        generator = np.random.default_rng(7)
        self.updates = {
            site: generator.normal(0, 0.3, self.length).astype(np.float32) for site in self.sites
        }
        self.weights = {site: 1 + 37 * site % 1000 for site in self.sites}

    @property
    def settings(self) -> Parameters:
        assert self.parameters is not None
        return self.parameters

    def open_site(self, site: int, /, **changes: Any) -> MaskingParty:
        """The site as it starts: it remembers what it claimed, and nothing else."""
        arguments: dict[str, Any] = {
            "site": site,
            "identity": self.identities[site],
            "roster": self.roster,
            "policy": self.policy,
            "parameters": self.settings,
            "claim": lambda *now: self.claim(site, now),
            "pledge": lambda work, total: self.pledge(site, work, total),
            "threads": self.threads,
        }
        if self.fixed:
            arguments["entropy"] = stream(f"site {site}")
        return MaskingParty(**(arguments | changes))

    def claim(self, site: int, now: tuple[int, SecAggStage]) -> None:
        """What a site's disk does for it."""
        if now <= self.claims.get(site, (0, 0)):
            raise StageError("this stage, or a later one, was served before")
        self.claims[site] = now

    def pledge(self, site: int, work: bytes, total: bytes) -> None:
        if self.pledges.setdefault((site, work), total) != total:
            raise StageError("this work was summed before, over other sites")

    def open_server(self, number: int = 1, **changes: Any) -> UnmaskingServer:
        arguments: dict[str, Any] = {
            "roster": self.roster,
            "policy": self.policy,
            "parameters": self.settings,
            "round_number": number,
            "model": MODEL if number == 1 else hash_model(ADAPTER, b"%d" % number),
            "threads": self.threads,
        }
        return UnmaskingServer(**(arguments | changes))

    def contribute(self, site: int) -> Any:
        return self.sites[site].mask(
            self.updates[site],
            self.weights[site],
            (site / 4, -1.5),
            np.random.default_rng([3, site]),
        )

    def expected(self, survivors: Sequence[int]) -> NDArray[np.int64]:
        """The exact sum, in Python integers of numpy's width, with no mask anywhere."""
        from fedgraft.common.secagg.quantize import LANES, encode_update

        total = np.zeros(self.length, np.int64)
        for site in survivors:
            vector = encode_update(
                self.updates[site],
                self.weights[site],
                (),
                self.settings.coding,
                np.random.default_rng([3, site]),
            )
            total += vector[LANES:].view(np.int32)
        return total

    def check(self, result: Aggregate) -> None:
        np.testing.assert_array_equal(result.sums, self.expected(result.survivors))
        assert result.weight == sum(self.weights[site] for site in result.survivors)
        count = len(result.survivors)
        wanted = (sum(result.survivors) / 4, -1.5 * count)
        np.testing.assert_allclose(result.metrics, wanted, atol=1e-4 * count)

    def drive(self, until: str = "", number: int = 1) -> UnmaskingServer:
        """Go through the stages before ``until`` without trouble."""
        server = self.open_server(number)
        self.advance(server, "keys", until)
        return server

    def advance(self, server: UnmaskingServer, first: str, until: str = "") -> Any:
        """Go through the stages from ``first`` to before ``until``; the last stage's request."""
        answer: Any = None
        for stage in STAGES[STAGES.index(first) :]:
            if stage == until:
                break
            answer = getattr(self, f"do_{stage}")(server, answer)
        return answer

    def do_keys(self, server: UnmaskingServer, _: Any = None, drop: Collection[int] = ()) -> Any:
        request = server.keys_request()
        for site in self.alive(drop):
            server.add_advertisement(self.sites[site].advertise(request))
        return server.close_keys()

    def do_shares(self, server: UnmaskingServer, request: Any, drop: Collection[int] = ()) -> Any:
        for site in self.alive(drop):
            server.add_shares(self.sites[site].share(request))
        return server.close_shares()

    def do_train(self, server: UnmaskingServer, boxes: Any, drop: Collection[int] = ()) -> Any:
        for site in self.alive(drop):
            self.sites[site].accept(boxes[site], server._frame.model)
            server.add_masked(self.contribute(site))
        return server.close_training()

    def do_confirm(self, server: UnmaskingServer, request: Any, drop: Collection[int] = ()) -> Any:
        for site in self.alive(drop):
            server.add_confirmation(self.sites[site].confirm(request))
        return server.close_confirm()

    def do_unmask(
        self, server: UnmaskingServer, request: UnmaskRequest, drop: Collection[int] = ()
    ) -> Aggregate:
        for site in self.alive(drop):
            server.add_opening(self.sites[site].unmask(request))
        return server.finish()

    def alive(self, drop: Collection[int]) -> list[int]:
        """Drop ``drop`` for good."""
        self.gone = getattr(self, "gone", set()) | set(drop)
        return [site for site in self.sites if site not in self.gone]

    def run(self, drops: Mapping[str, Collection[int]] | None = None, number: int = 1) -> Aggregate:
        """A whole round in which sites drop just before a stage."""
        self.gone = set()
        server, answer = self.open_server(number), None
        for stage in STAGES:
            answer = getattr(self, f"do_{stage}")(server, answer, (drops or {}).get(stage, ()))
        assert isinstance(answer, Aggregate)
        return answer


def among(survivors: Survivors, masked: tuple[int, ...]) -> Survivors:
    """The survivors as a coordinator shows them that left some out of the sum."""
    signed = dict(zip(survivors.masked, survivors.signatures, strict=True))
    return Survivors(survivors.shared, masked, tuple(signed[site] for site in masked))


def unsigned(shared: tuple[int, ...], masked: tuple[int, ...]) -> Survivors:
    """Survivors that must be refused before a signature is looked at."""
    return Survivors(shared, masked, (b"",) * len(masked))


def refused(call: Any, *arguments: Any) -> SecAggError:
    """The error that a call must raise."""
    try:
        call(*arguments)
    except SecAggError as error:
        return error
    raise AssertionError("nothing was raised")
