"""The n = 4 transcript, computed by the slow reference: every byte that any party sends.

Complete graph, T = 1, so 3 signatures and 3 shares; site 2 drops after SHARES.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from secagg import reference as slow

PROTOCOL = "fedgraft-secagg/1"
SALT = PROTOCOL.encode()
SITES, SURVIVORS, THRESHOLD = (0, 1, 2, 3), (0, 1, 3), 3


def replay(case: dict[str, Any]) -> dict[str, Any]:  # noqa: C901  # one story, told once
    """All messages of the round, hex, from a case's secrets and inputs."""
    publics = [slow.ed25519_public(bytes.fromhex(key)) for key in case["identities"]]
    coding = case["coding"]
    context = slow.sha(
        "context",
        PROTOCOL,
        slow.sha("roster", *publics),
        slow.encode(*case["policy"][:3], float(case["policy"][3])),
        bytes.fromhex(case["session"]),
        slow.encode(*SITES),
        case["length"],
        bytes.fromhex(case["layout"]),
        slow.encode(*(coding[key] for key in ("parties", "ring_bits", "value_bits", "max_weight"))),
        slow.encode(float(coding["clip"]), float(coding["metric_limit"])),
        slow.encode(1, 0, 3),
        slow.encode(THRESHOLD, 3),
    )
    frame = (context, case["round"], bytes.fromhex(case["model"]))

    def statement(kind: str, sender: int, body: bytes) -> bytes:
        return slow.encode(PROTOCOL, kind, *frame, sender, body)

    def signed(kind: str, sender: int, body: bytes) -> bytes:
        return slow.ed25519_sign(
            bytes.fromhex(case["identities"][sender]), statement(kind, sender, body)
        )

    seeds, mask, seal, drawn = [], [], [], []
    for text in case["secrets"]:
        secret = bytes.fromhex(text)
        seeds.append(secret[:32])
        mask.append(secret[32:64])
        seal.append(secret[64:96])
        drawn.append(secret[96:])
    mask_public = [slow.x25519_public(key) for key in mask]
    seal_public = [slow.x25519_public(key) for key in seal]
    bodies = []
    for site in SITES:
        commitment = hashlib.sha256(SALT + b" commitment" + seeds[site]).digest()
        bodies.append(slow.encode(mask_public[site], seal_public[site], commitment))
    advertised = slow.sha(
        "advertised", *frame, *(slow.encode(site, bodies[site]) for site in SITES)
    )

    shares = [
        slow.shamir_split(seeds[site] + mask[site], THRESHOLD, [s + 1 for s in SITES], drawn[site])
        for site in SITES
    ]

    def envelope(sender: int, recipient: int) -> bytes:
        agreed = slow.x25519(seal[sender], seal_public[recipient])
        info = statement("seal", sender, slow.encode(advertised, recipient))
        return slow.gcm_seal(slow.hkdf(agreed, SALT, info), shares[sender][recipient], advertised)

    def pair_key(one: int, other: int) -> bytes:
        low, high = sorted((one, other))
        agreed = slow.x25519(mask[one], mask_public[other])
        body = slow.encode(high, mask_public[low], mask_public[high])
        return slow.hkdf(agreed, SALT, statement("pair", low, body))

    def plain(site: int) -> list[int]:
        values = slow.quantise(
            case["updates"][site], case["weights"][site], coding, case["uniform"][site]
        )
        return slow.header(case["weights"][site], case["metrics"][site], coding) + values

    def masked(site: int) -> bytes:
        size = 8 + case["length"]
        own = slow.words(slow.hkdf(seeds[site], SALT, statement("seed", site, b"")), size)
        total = [a + b for a, b in zip(plain(site), own, strict=True)]
        for other in SITES:
            if other != site:
                sign = 1 if site < other else -1
                stream = slow.words(pair_key(site, other), size)
                total = [a + sign * b for a, b in zip(total, stream, strict=True)]
        return slow.pack(total, coding["ring_bits"])

    agreed = slow.sha("survivors", advertised, slow.encode(*SITES), slow.encode(*SURVIVORS))
    openings = {
        site: [
            shares[owner][site][:32] if owner in SURVIVORS else shares[owner][site][32:]
            for owner in SITES
        ]
        for site in SURVIVORS
    }
    points = [site + 1 for site in SURVIVORS]
    for owner in SITES:
        secret = slow.shamir_combine(points, [openings[site][owner] for site in SURVIVORS])
        assert secret == (seeds[owner] if owner in SURVIVORS else mask[owner])
    return {
        "context": context.hex(),
        "advertised": advertised.hex(),
        "advertisements": [
            {"body": bodies[s].hex(), "signature": signed("keys", s, bodies[s]).hex()}
            for s in SITES
        ],
        "envelopes": [[envelope(s, r).hex() for r in SITES if r != s] for s in SITES],
        "masked": [masked(site).hex() for site in SURVIVORS],
        "masked_signatures": [
            signed("masked", site, slow.encode(advertised, *SITES)).hex() for site in SURVIVORS
        ],
        "confirmations": [signed("confirm", site, agreed).hex() for site in SURVIVORS],
        "openings": [[share.hex() for share in openings[site]] for site in SURVIVORS],
        "sums": column_sums([plain(site)[8:] for site in SURVIVORS]),
    }


def column_sums(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
