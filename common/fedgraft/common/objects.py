"""Flower's objects that need not be asked for, because it is known what is in them.

Flower moves a message as a tree of objects, each named by the SHA-256 of its content and each asked
for in a request of its own; at a SuperLink a request costs more than anything else in a round. Most
of our messages (``messages.py``) are three objects: the payload, the record that names it, and the
message's head. The record says nothing but the payload's id, and the head what came with the offer
of the message. So both are made here, and taken if their hash is the id that was offered.
"""

import hashlib
import json
from collections.abc import Sequence

from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER

__all__ = ["known_objects"]


def known_objects(
    identifiers: Sequence[str], offered: ProtoMessage | None = None
) -> dict[str, bytes]:
    """Content by id (hex of SHA-256) of those objects of a message that need not be asked for.

    ``identifiers`` are those of all its objects, parts before what they are parts of; ``offered``
    is the message without its content, if it is at hand.
    """
    if len(identifiers) != 3:  # with large arrays there are more: the record names several
        return {}
    payload, record, _ = identifiers
    body = json.dumps({"payload": payload}).encode()
    made = [_object("RecordDict", payload, body)]
    if offered is not None:
        head = ProtoMessage(metadata=offered.metadata)
        head.metadata.message_id = ""
        made.append(_object("Message", record, head.SerializeToString(deterministic=True)))
    named = {hashlib.sha256(content).hexdigest(): content for content in made}
    return {name: content for name, content in named.items() if name in identifiers}


def _object(kind: str, child: str, body: bytes) -> bytes:
    """An object as Flower lays it out: its class, the ids of its parts, its length, its body."""
    head = HEAD_VALUE_DIVIDER.join((kind, child, str(len(body))))
    return bytes(head.encode() + HEAD_BODY_DIVIDER + body)
