"""Masks: AES-256-CTR key streams added to a vector of uint32, one cache-sized chunk at a time.

SP 800-38A, 6.5. A key makes only one mask in its lifetime, so the counter starts at zero. Word i of
a mask is bytes 4i..4i+3 of the key stream, little-endian. A chunk of the accumulator takes *every*
mask before the next chunk is processed, so key streams never leave the processor's cache. Addition
modulo 2^32 is commutative: chunks, threads and the order of masks cannot change a bit of the
result.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.keys import KEY_BYTES

__all__ = ["CHUNK", "Mask", "add_masks"]

Words = NDArray[np.uint32]

CHUNK = 1 << 16  # words: 256 KB, so that accumulator, zeros and key stream share an L2 cache
GROUP = 256  # ciphers open at once; limits memory if one party removes a million masks
BLOCK = 16  # bytes of an AES block: four words


@dataclass(frozen=True, slots=True)  # slots: a coordinator holds thousands
class Mask:
    """One key stream, to add (``sign`` 1) or to subtract (-1)."""

    key: bytes = field(repr=False)
    sign: int


def add_masks(
    vector: Words, masks: Sequence[Mask], *, threads: int = 1, chunk: int = CHUNK
) -> None:
    """Add all ``masks`` to ``vector`` (uint32 [any size], contiguous), in place, modulo 2^32.

    Each of the ``threads`` works on its own range of coordinates; ``chunk`` is in words, a multiple
    of 4.

    Raises:
        ParameterError: another dtype or layout, a key that is not 32 bytes, a sign that is not
            1 or -1, or threads or chunk out of range.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.flags.carray:
        raise ParameterError("masks are added to a contiguous vector of uint32")
    if threads < 1 or chunk < 4 or chunk % 4:
        raise ParameterError("threads must be positive and chunk a positive multiple of 4")
    if any(len(mask.key) != KEY_BYTES or mask.sign not in (1, -1) for mask in masks):
        raise ParameterError("a mask is a 32-byte key and a sign")
    step = max(4, -(-vector.size // threads) + 3 & ~3)  # ranges start on an AES block
    starts = range(0, vector.size, step)
    if not vector.size:
        return
    if len(starts) == 1:
        _add_range(vector, masks, 0, chunk)
        return
    with ThreadPoolExecutor(len(starts)) as pool:
        jobs = [
            pool.submit(_add_range, vector[start : start + step], masks, start, chunk)
            for start in starts
        ]
        for job in jobs:
            job.result()


def _add_range(part: Words, masks: Sequence[Mask], start: int, chunk: int) -> None:
    """Add masks to ``part``, whose first word is word ``start`` of the vector."""
    chunk = min(chunk, -(-part.size // 4) * 4)
    zeros = memoryview(bytes(4 * chunk))
    stream = np.empty(4 * chunk + BLOCK, np.uint8)  # a cipher needs one block more than it writes
    target, words = stream.data, stream[: 4 * chunk].view("<u4")
    first_block = (start // 4).to_bytes(BLOCK, "big")
    for group in range(0, len(masks), GROUP):
        steps = [
            (
                Cipher(algorithms.AES(mask.key), modes.CTR(first_block)).encryptor().update_into,
                np.add if mask.sign > 0 else np.subtract,
            )
            for mask in masks[group : group + GROUP]
        ]
        for low in range(0, part.size, chunk):
            piece = part[low : low + chunk]
            nothing, given = zeros[: 4 * piece.size], words[: piece.size]
            for encrypt_into, combine in steps:
                encrypt_into(nothing, target)
                combine(piece, given, piece)
    stream[:] = 0
