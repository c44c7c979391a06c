"""Leakage: what can be read from messages, states, errors and reprs, and what cannot."""

import copy
import dataclasses
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from secagg.federation import MODEL, STAGES, Federation, refused

from fedgraft.client.secagg.masking_party import MaskingParty
from fedgraft.common.secagg.errors import SecAggError, StageError
from fedgraft.common.secagg.statements import Delivery, MaskedInput


def contents(thing: Any) -> Iterator[bytes]:
    """Every bytes, number and array in a message."""
    if dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from contents(getattr(thing, field.name))
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from contents(item)
    elif isinstance(thing, np.ndarray):
        yield thing.tobytes()
    elif isinstance(thing, bytes):
        yield thing
    else:
        yield repr(thing).encode()


class Recorder(Federation):
    """Keeps what every site sends and the secrets it had when it sent it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sent: list[Any] = []
        self.secrets: set[bytes] = set()
        for site in self.sites:
            self.sites[site] = self.tap(self.sites[site])

    def tap(self, party: MaskingParty) -> Any:
        recorder = self

        class Tap:
            def __getattr__(self, name: str) -> Any:
                method = getattr(party, name)
                if not callable(method):
                    return method

                def call(*arguments: Any) -> Any:
                    reply = method(*arguments)
                    if reply is not None:
                        recorder.sent.append(reply)
                    now = party._round
                    if now is not None:
                        recorder.secrets |= {bytes(now.seed), bytes(now.mask_pair.private)}
                        recorder.secrets |= {bytes(now.seal_pair.private)}
                        recorder.secrets |= set(now.open_keys.values())
                        recorder.secrets -= {bytes(32)}
                    return reply

                return call

        return Tap()


def test_no_message_holds_a_secret_an_update_or_a_number_in_clear() -> None:
    federation = Recorder(5, length=200)
    federation.weights = {site: 700 + site for site in range(5)}
    federation.check(federation.run({"train": [3]}))
    sent = [content for message in federation.sent for content in contents(message)]
    everything = b"\0".join(sent)
    assert len(federation.secrets) >= 5 * 3
    for secret in federation.secrets:
        assert secret not in everything
    for site in range(5):
        assert federation.updates[site].tobytes()[:16] not in everything
        for encoded in (str(700 + site).encode(), (700 + site).to_bytes(4, "little")):
            assert encoded not in everything
    numbers = {content for content in sent if content.isdigit()}
    assert numbers <= {str(site).encode() for site in range(5)}  # ids, and nothing else


def test_the_masked_vector_is_uniform() -> None:
    """Chi-square over bytes, for an update of zeros; 255 degrees of freedom."""
    federation = Federation(3, length=40_000)
    federation.updates = {site: np.zeros(40_000, np.float32) for site in range(3)}
    boxes = federation.advance(federation.open_server(), "keys", until="train")
    federation.sites[0].accept(boxes[0], MODEL)
    packed = federation.contribute(0).packed
    counts = np.bincount(packed, minlength=256)
    expected = packed.size / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 130 < chi < 420  # beyond seven standard deviations of 22.6


def test_equal_inputs_look_different_between_sites_and_rounds() -> None:
    federation = Federation(4, length=64)
    seen = []
    for number in (1, 2):
        server = federation.open_server(number, model=MODEL)
        boxes = federation.advance(server, "keys", until="train")
        for site in range(4):
            federation.updates[site] = np.full(64, 0.25, np.float32)
            federation.weights[site] = 100
            federation.sites[site].accept(boxes[site], MODEL)
            seen.append(federation.contribute(site).packed)
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert (one == other).mean() < 0.06  # 1/256 by chance, of 224 bytes
            assert not np.array_equal(one[:4], other[:4])  # the count lane, 1 in all of them


def test_without_one_neighbours_mask_the_rest_says_nothing() -> None:
    """The coordinator and one colluder of three remove all they can: what is left is a mask."""
    from fedgraft.common.secagg.keys import derive
    from fedgraft.common.secagg.masking import Mask, add_masks
    from fedgraft.common.secagg.quantize import LANES, add_packed
    from fedgraft.common.secagg.transcript import pair_info, seed_info

    federation = Federation(3, length=4000)
    federation.updates[0] = np.zeros(4000, np.float32)
    boxes = federation.advance(federation.open_server(), "keys", until="train")
    victim, colluder = federation.sites[0]._round, federation.sites[2]._round
    assert victim is not None and colluder is not None
    seed, frame = bytes(victim.seed), victim.frame  # opened later, as it must be
    shared = derive(
        colluder.mask_pair.agree(colluder.mask_keys[0]),
        pair_info(frame, {2: colluder.own.mask_key, **colluder.mask_keys}, 0, 2),
    )
    federation.sites[0].accept(boxes[0], MODEL)
    total = np.zeros(LANES + 4000, np.uint32)
    add_packed(total, federation.contribute(0).packed, 24)
    add_masks(total, [Mask(derive(seed, seed_info(frame, 0)), -1), Mask(shared, -1)])
    left = total[LANES:] & np.uint32(0xFFFFFF)
    assert np.unique(left).size > 3990
    assert abs(left.mean() / 2**24 - 0.5) < 0.03


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_abort_wipes_every_secret(stage: str) -> None:
    federation = Federation(4)
    federation.drive(until=stage)
    site = federation.sites[0]
    now = site._round
    assert now is not None
    held, seed, mask, seal = list(now.held.values()), now.seed, now.mask_pair, now.seal_pair
    site.abort()
    assert seed == bytes(32)
    assert mask.private == seal.private == bytes(32)
    assert all(share == bytes(64) for share in held)
    assert now.held == now.open_keys == {}
    site.abort()  # again is harmless


def test_own_masks_are_wiped_as_soon_as_the_input_is_masked() -> None:
    federation = Federation(4)
    federation.drive(until="confirm")
    now = federation.sites[0]._round
    assert now is not None
    assert now.seed == now.mask_pair.private == now.seal_pair.private == bytes(32)
    assert now.open_keys == {}


def test_unmasking_wipes_the_shares_of_others() -> None:
    federation = Federation(4)
    server = federation.open_server()
    request = federation.advance(server, "keys", until="unmask")
    now = federation.sites[0]._round
    assert now is not None
    held = list(now.held.values())
    federation.sites[0].unmask(request)
    assert all(share == bytes(64) for share in held)
    assert federation.sites[0]._round is None


def test_a_party_cannot_be_stored_or_copied() -> None:
    federation = Federation(3)
    site = federation.sites[0]
    federation.drive(until="train")
    for what in (site, site._round):
        for store in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(StageError):
                store(what)


def test_reprs_show_no_content() -> None:
    federation = Federation(3)
    server = federation.drive(until="confirm")
    site = federation.sites[0]
    now = site._round
    assert now is not None
    shown = f"{site!r} {now!r} {server!r}"
    assert "65" not in repr(MaskedInput(1, np.full(4, 65, np.uint8), b""))
    for share in now.held.values():
        assert bytes(share).hex() not in shown
        assert repr(bytes(share)) not in shown


def test_errors_show_no_content() -> None:
    federation = Federation(5)
    server = federation.open_server()
    boxes = federation.advance(server, "keys", until="train")
    site = federation.sites[0]
    now = site._round
    assert now is not None
    secrets = [bytes(now.seed), bytes(now.mask_pair.private), *map(bytes, now.held.values())]
    first = dataclasses.replace(boxes[0].envelopes[0], ciphertext=bytes(80))
    error = refused(site.accept, Delivery((first,)), MODEL)
    assert isinstance(error, SecAggError)
    assert error.hint
    text = "".join(traceback.format_exception(error))
    for secret in secrets:
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in text
    assert error.__suppress_context__ and error.__cause__ is None


def test_copies_of_secrets_are_wiped_while_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgraft.client.secagg import masking_party as secagg

    wiped: list[int] = []
    from fedgraft.common.secagg.keys import wipe as plain

    def record(secret: bytearray) -> None:
        plain(secret)
        wiped.append(len(secret))

    federation = Federation(4)
    server = federation.open_server()
    request = federation.advance(server, "keys", until="shares")
    monkeypatch.setattr(secagg, "wipe", record)
    federation.sites[0].share(request)
    assert wiped == [64] * 4  # seed and mask key together, and one share for each neighbour
