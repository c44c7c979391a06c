"""Who a reply is from: a site signs what it sends, so that only the site asked can have said it.

Between a site and ``rounds.py`` lie nginx and the SuperLink, which delivers a reply to whoever
knows the id of a request. A seal is an Ed25519 signature (RFC 8032) by the site's identity over
its name, the id of the request and all of the reply's content; so a reply cannot be made by another
site, changed on its way, or used as the answer to another request.
"""

import hashlib
from collections.abc import Callable

from flwr.app import ConfigRecord, RecordDict

from fedgraft.common.errors import MessageError
from fedgraft.common.secagg.errors import StatementError
from fedgraft.common.secagg.keys import verify

__all__ = ["seal", "unseal"]

PLACE, SITE, SIGNATURE = "payload", "seal.site", "seal.signature"
CONTEXT = b"fedgraft-reply/1\n"


def seal(content: RecordDict, *, site: str, request: str, sign: Callable[[bytes], bytes]) -> None:
    """Add the seal of ``site`` to ``content``, the reply to the message with the id ``request``."""
    signature = sign(_digest(content, site, request))
    # In the payload's record: one of its own would cost two requests more.
    content.config_records[PLACE].update({SITE: site, SIGNATURE: signature})


def unseal(content: RecordDict, *, request: str, key_of: Callable[[str], bytes | None]) -> str:
    """Take the seal off ``content``; the name of the site whose seal it is.

    ``key_of`` gives the 32-byte public key of a site, or None.

    Raises:
        MessageError: there is no seal, or it is not one of that site over this reply.
    """
    record = content.config_records.get(PLACE, ConfigRecord())
    site, signature = record.pop(SITE, None), record.pop(SIGNATURE, None)
    if not isinstance(site, str) or not isinstance(signature, bytes):
        raise MessageError("a reply without a seal")
    key = key_of(site)
    if key is None:
        raise MessageError("a reply with the seal of a stranger")
    try:
        verify(key, signature, _digest(content, site, request))
    except StatementError:
        raise MessageError("a reply whose seal is broken") from None
    return site


def _digest(content: RecordDict, site: str, request: str) -> bytes:
    """What is signed; every part with its length before it, so that none can pass for another."""
    digest = hashlib.sha256()
    for part in (CONTEXT, site.encode(), request.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    for name in sorted(content):
        record = content[name]
        parts = [name.encode(), type(record).__name__.encode()]
        if name in content.array_records:
            for key, array in content.array_records[name].items():
                shape = ",".join(map(str, array.shape)).encode()
                parts += [key.encode(), array.dtype.encode(), shape, array.data]
        else:
            parts.append(record.deflate())
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
