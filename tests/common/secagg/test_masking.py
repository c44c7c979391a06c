"""Masks: the standard's key stream, and the same bits whatever the chunks, threads or order."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg import reference as slow
from support.matrix import tries

from fedgraft.common.secagg import masking
from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.masking import Mask, add_masks

CASE = json.loads(
    (Path(__file__).parents[2] / "vectors/secagg/standards.json").read_text(encoding="utf-8")
)["sp800_38a"]
KEYS = [bytes([n]) * 32 for n in range(1, 8)]
MASKS = [Mask(key, 1 if n % 3 else -1) for n, key in enumerate(KEYS)]


def expected(size: int, masks: list[Mask]) -> list[int]:
    total = [0] * size
    for mask in masks:
        total = [
            (a + mask.sign * b) % 2**32
            for a, b in zip(total, slow.words(mask.key, size), strict=True)
        ]
    return total


def test_the_key_stream_is_sp_800_38a() -> None:
    key, counter, plain, cipher = (
        bytes.fromhex(CASE[name]) for name in ("key", "counter", "plaintext", "ciphertext")
    )
    part = np.zeros(16, np.uint32)
    masking._add_range(part, [Mask(key, 1)], 4 * int.from_bytes(counter, "big"), masking.CHUNK)
    stream = part.astype("<u4").tobytes()
    assert bytes(a ^ b for a, b in zip(stream, plain, strict=True)) == cipher
    assert slow.ctr(key, 64, int.from_bytes(counter, "big")) == stream


def test_a_mask_starts_at_counter_zero_and_is_little_endian() -> None:
    vector = np.zeros(9, np.uint32)
    add_masks(vector, MASKS[:3])
    assert vector.tolist() == expected(9, MASKS[:3])


@settings(max_examples=tries(40), deadline=None)
@given(
    size=st.integers(0, 90),
    threads=st.integers(1, 5),
    chunk=st.integers(1, 12).map(lambda n: 4 * n),
    masks=st.permutations(MASKS),
)
def test_chunks_threads_and_order_change_no_bit(
    size: int, threads: int, chunk: int, masks: list[Mask]
) -> None:
    plain, other = np.arange(size, dtype=np.uint32), np.arange(size, dtype=np.uint32)
    add_masks(plain, MASKS)
    add_masks(other, masks, threads=threads, chunk=chunk)
    np.testing.assert_array_equal(plain, other)


def test_groups_of_ciphers_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "GROUP", 2)
    vector = np.zeros(50, np.uint32)
    add_masks(vector, MASKS, chunk=8)
    assert vector.tolist() == expected(50, MASKS)


def test_the_opposite_sign_cancels() -> None:
    vector = np.arange(70_001, dtype=np.uint32)
    add_masks(vector, [*MASKS, *(Mask(mask.key, -mask.sign) for mask in MASKS)], threads=2)
    np.testing.assert_array_equal(vector, np.arange(70_001))


def read_only() -> np.ndarray:
    vector = np.zeros(8, np.uint32)
    vector.flags.writeable = False
    return vector


@pytest.mark.parametrize(
    ("vector", "mask", "threads", "chunk"),
    [
        (np.zeros(8, np.int64), MASKS[0], 1, 4),
        (np.zeros((2, 4), np.uint32), MASKS[0], 1, 4),
        (np.zeros(16, np.uint32)[::2], MASKS[0], 1, 4),
        (read_only(), MASKS[0], 1, 4),
        (np.zeros(8, np.uint32), Mask(b"short", 1), 1, 4),
        (np.zeros(8, np.uint32), Mask(bytes(32), 0), 1, 4),
        (np.zeros(8, np.uint32), MASKS[0], 0, 4),
        (np.zeros(8, np.uint32), MASKS[0], 1, 0),
        (np.zeros(8, np.uint32), MASKS[0], 1, 6),
    ],
)
def test_what_cannot_be_masked_is_refused(
    vector: np.ndarray, mask: Mask, threads: int, chunk: int
) -> None:
    with pytest.raises(ParameterError):
        add_masks(vector, [mask], threads=threads, chunk=chunk)


def test_a_mask_does_not_print_its_key() -> None:
    assert "key" not in repr(MASKS[0])
