"""The seal of a reply: a site signs its replies, so that only the requested site can send them.

nginx and the SuperLink are between a site and ``server/rounds.py``, and the SuperLink passes on a
reply from anyone who knows the id of a request. A seal is an Ed25519 signature (RFC 8032) with the
site's identity over its name, the id of the request and the full content of the reply. So another
site cannot make the reply, nobody can change it on its way, and it cannot be used as the answer to
another request.
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
    # In the payload's record: a record of its own would cost two more requests.
    content.config_records[PLACE].update({SITE: site, SIGNATURE: signature})


def unseal(content: RecordDict, *, request: str, key_of: Callable[[str], bytes | None]) -> str:
    """Remove the seal from ``content`` and return the name of the site that made it.

    ``key_of`` returns the 32-byte public key of a site, or None.

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
    """Return the digest to sign.

    The length of every part precedes the part, so that no part can be read as another part.
    """
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
