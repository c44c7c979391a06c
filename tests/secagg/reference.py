"""Secure aggregation once more, slowly: Python integers and hashlib, nothing of ours, no numpy.

Written from the RFCs and the specification, so that the fast code is checked against something
that shares none of its tables, tricks or libraries.
"""

import hashlib
import hmac
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

P = 2**255 - 19


# --- RFC 7748 -------------------------------------------------------------------------------
def x25519(scalar: bytes, point: bytes) -> bytes:
    k = int.from_bytes(scalar, "little") & ~7 & (1 << 255) - 1 | 1 << 254
    u = int.from_bytes(point, "little") & (1 << 255) - 1
    x2, z2, x3, z3 = 1, 0, u, 1
    for bit in range(254, -1, -1):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a, c * b
        x3, z3 = (da + cb) ** 2 % P, u * (da - cb) ** 2 % P
        aa, bb = a * a % P, b * b % P
        e = aa - bb
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def x25519_public(scalar: bytes) -> bytes:
    return x25519(scalar, (9).to_bytes(32, "little"))


# --- RFC 8032 -------------------------------------------------------------------------------
D = -121665 * pow(121666, P - 2, P) % P
ORDER = 2**252 + 27742317777372353535851937790883648493
Point = tuple[int, int]


def _add(one: Point, other: Point) -> Point:
    (x1, y1), (x2, y2) = one, other
    cross = D * x1 * x2 * y1 * y2 % P
    x = (x1 * y2 + x2 * y1) * pow(1 + cross, P - 2, P) % P
    y = (y1 * y2 + x1 * x2) * pow(1 - cross, P - 2, P) % P
    return x, y


def _base() -> Point:
    y = 4 * pow(5, P - 2, P) % P
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return (P - x if x & 1 else x), y


def _times(scalar: int, point: Point) -> bytes:
    total: Point = (0, 1)
    while scalar:
        if scalar & 1:
            total = _add(total, point)
        point, scalar = _add(point, point), scalar >> 1
    return (total[1] | (total[0] & 1) << 255).to_bytes(32, "little")


def _ed_scalar(private: bytes) -> tuple[int, bytes]:
    wide = hashlib.sha512(private).digest()
    return int.from_bytes(wide[:32], "little") & (1 << 254) - 8 | 1 << 254, wide[32:]


def ed25519_public(private: bytes) -> bytes:
    return _times(_ed_scalar(private)[0], _base())


def ed25519_sign(private: bytes, message: bytes) -> bytes:
    scalar, prefix = _ed_scalar(private)
    nonce = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % ORDER
    commitment = _times(nonce, _base())
    challenge = hashlib.sha512(commitment + ed25519_public(private) + message).digest()
    answer = (nonce + int.from_bytes(challenge, "little") * scalar) % ORDER
    return commitment + answer.to_bytes(32, "little")


# --- RFC 5869 -------------------------------------------------------------------------------
def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    key = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    out, block = b"", b""
    for count in range(1, math.ceil(size / 32) + 1):
        block = hmac.new(key, block + info + bytes([count]), hashlib.sha256).digest()
        out += block
    return out[:size]


# --- FIPS 197, SP 800-38A, SP 800-38D ---------------------------------------------------------
def _xtime(a: int) -> int:
    return (a << 1 ^ (0x11B if a & 0x80 else 0)) & 0xFF


def _aes_multiply(a: int, b: int) -> int:
    out = 0
    while b:
        out, a, b = out ^ (a if b & 1 else 0), _xtime(a), b >> 1
    return out


def _s_box() -> list[int]:
    box = []
    for a in range(256):
        inverse = next((b for b in range(256) if _aes_multiply(a, b) == 1), 0)
        turned = [(inverse << n | inverse >> 8 - n) & 0xFF for n in range(5)]
        box.append(turned[0] ^ turned[1] ^ turned[2] ^ turned[3] ^ turned[4] ^ 0x63)
    return box


S_BOX = _s_box()


def aes256(key: bytes) -> Callable[[bytes], bytes]:
    words = [list(key[i : i + 4]) for i in range(0, 32, 4)]
    constant = 1
    for i in range(8, 60):
        word = list(words[i - 1])
        if i % 8 == 0:
            word = [S_BOX[b] for b in word[1:] + word[:1]]
            word[0] ^= constant
            constant = _xtime(constant)
        elif i % 8 == 4:
            word = [S_BOX[b] for b in word]
        words.append([a ^ b for a, b in zip(word, words[i - 8], strict=True)])
    keys = [[b for word in words[4 * r : 4 * r + 4] for b in word] for r in range(15)]

    def encrypt(block: bytes) -> bytes:
        state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
        for r in range(1, 15):
            state = [S_BOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
            if r < 14:
                mixed = []
                for c in range(0, 16, 4):
                    col = state[c : c + 4]
                    for i in range(4):
                        a, b = col[i], col[(i + 1) % 4]
                        rest = col[(i + 2) % 4] ^ col[(i + 3) % 4]
                        mixed.append(_xtime(a) ^ _xtime(b) ^ b ^ rest)
                state = mixed
            state = [a ^ b for a, b in zip(state, keys[r], strict=True)]
        return bytes(state)

    return encrypt


def ctr(key: bytes, size: int, counter: int = 0) -> bytes:
    encrypt = aes256(key)
    blocks = (encrypt((counter + i).to_bytes(16, "big")) for i in range(-(-size // 16)))
    return b"".join(blocks)[:size]


def gcm_seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    encrypt = aes256(key)
    h = int.from_bytes(encrypt(bytes(16)), "big")
    pad = ctr(key, len(plaintext), counter=2)  # the nonce is zero
    sealed = bytes(a ^ b for a, b in zip(plaintext, pad, strict=True))
    lengths = struct.pack(">QQ", 8 * len(associated), 8 * len(sealed))
    tag = 0
    for text in (associated, sealed, lengths):
        padded = text + bytes(-len(text) % 16)
        for i in range(0, len(padded), 16):
            tag = _gcm_multiply(tag ^ int.from_bytes(padded[i : i + 16], "big"), h)
    mask = int.from_bytes(encrypt((1).to_bytes(16, "big")), "big")
    return sealed + (tag ^ mask).to_bytes(16, "big")


def _gcm_multiply(x: int, y: int) -> int:
    out = 0
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            out ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return out


# --- Shamir over GF(2^16) -----------------------------------------------------------------------
def field_multiply(a: int, b: int) -> int:
    out = 0
    while b:
        if b & 1:
            out ^= a
        a, b = a << 1, b >> 1
        if a > 0xFFFF:
            a ^= 0x1100B
    return out


def field_inverse(a: int) -> int:
    out, power = 1, 2**16 - 2
    while power:
        if power & 1:
            out = field_multiply(out, a)
        a, power = field_multiply(a, a), power >> 1
    return out


def _halves(text: bytes) -> list[int]:
    return [int.from_bytes(text[i : i + 2], "little") for i in range(0, len(text), 2)]


def shamir_split(secret: bytes, threshold: int, points: Sequence[int], drawn: bytes) -> list[bytes]:
    """``drawn`` holds the coefficients, highest power first."""
    size = len(secret)
    rows = [_halves(drawn[i * size : (i + 1) * size]) for i in range(threshold - 1)]
    shares = []
    for x in points:
        values = []
        for column, constant in enumerate(_halves(secret)):
            value = 0
            for row in rows:
                value = field_multiply(value ^ row[column], x)
            values.append(value ^ constant)
        shares.append(b"".join(value.to_bytes(2, "little") for value in values))
    return shares


def shamir_combine(points: Sequence[int], shares: Sequence[bytes]) -> bytes:
    out = [0] * (len(shares[0]) // 2)
    for i, share in enumerate(shares):
        weight = 1
        for j, x in enumerate(points):
            if j != i:
                weight = field_multiply(weight, field_multiply(x, field_inverse(x ^ points[i])))
        out = [o ^ field_multiply(weight, y) for o, y in zip(out, _halves(share), strict=True)]
    return b"".join(value.to_bytes(2, "little") for value in out)


# --- the protocol -----------------------------------------------------------------------------
def encode(*fields: Any) -> bytes:
    out = len(fields).to_bytes(4, "big")
    for value in fields:
        if isinstance(value, bytes):
            letter, content = b"b", value
        elif isinstance(value, str):
            letter, content = b"s", value.encode()
        elif isinstance(value, int):
            letter, content = b"i", struct.pack(">q", value)
        else:
            letter, content = b"f", struct.pack(">d", value)
        out += letter + len(content).to_bytes(4, "big") + content
    return out


def sha(*fields: Any) -> bytes:
    return hashlib.sha256(encode(*fields)).digest()


def quantise(
    update: Sequence[float], weight: int, coding: dict[str, Any], uniform: Sequence[float]
) -> list[int]:
    """Exact rational arithmetic would differ from floats by 1e-12: compare with that in mind."""
    levels = 2 ** (coding["value_bits"] - 1) - 1
    clip, most = coding["clip"], coding["max_weight"]
    out = []
    for value, u in zip(update, uniform, strict=True):
        exact = max(-clip, min(clip, value)) * (weight / most * levels / clip)
        out.append(max(-levels, min(levels, math.floor(exact + u))))
    return out


def header(weight: int, metrics: Sequence[float], coding: dict[str, Any]) -> list[int]:
    levels = (2**31 - 1) // coding["parties"]
    fixed = [round(m * (levels / coding["metric_limit"])) % 2**32 for m in metrics]
    return [1, weight, *fixed, *([0] * (6 - len(fixed)))]


def words(key: bytes, count: int) -> list[int]:
    text = ctr(key, 4 * count)
    return [int.from_bytes(text[i : i + 4], "little") for i in range(0, 4 * count, 4)]


def pack(vector: Sequence[int], ring_bits: int) -> bytes:
    lanes = b"".join((word % 2**32).to_bytes(4, "little") for word in vector[:8])
    planes = {16: [(0, 2)], 24: [(0, 2), (16, 1)], 32: [(0, 4)]}[ring_bits]
    return lanes + b"".join(
        ((word >> shift) % 256**width).to_bytes(width, "little")
        for shift, width in planes
        for word in vector[8:]
    )
