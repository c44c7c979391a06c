"""Flower's objects that need not be asked for, because it is known what is in them.

Flower moves a message as a tree of objects, each named by the SHA-256 of its content and each asked
for in a request of its own; at a SuperLink a request costs more than anything else in a round. Most
of our messages (``messages.py``) are three objects: the payload, the record that names it, and the
message's head. The record says nothing but the payload's id, and the head what came with the offer
of the message. So both are made here, and taken if their hash is the id that was offered.

What the other side makes itself must not be sent either: it takes the message as soon as it has
the rest, upon which the SuperLink forgets all its objects and refuses those still on their way.
"""

import hashlib
import json
from collections.abc import Sequence

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree

__all__ = ["known_objects", "unasked_objects"]


def known_objects(identifiers: Sequence[str], offered: ProtoMessage | None) -> dict[str, bytes]:
    """Content by id (hex of SHA-256) of those objects of a message that need not be asked for.

    ``identifiers`` are those of all its objects, parts before what they are parts of; ``offered``
    is the message without its content, if it is at hand.
    """
    if len(identifiers) != 3 or offered is None:
        return {}  # with large arrays there are more: the record names several
    payload, record, _ = identifiers
    body = json.dumps({"payload": payload}).encode()
    head = ProtoMessage(metadata=offered.metadata)
    head.metadata.message_id = ""
    made = (
        _object("RecordDict", payload, body),
        _object("Message", record, head.SerializeToString(deterministic=True)),
    )
    named = {hashlib.sha256(content).hexdigest(): content for content in made}
    return {name: content for name, content in named.items() if name in identifiers}


def unasked_objects(message: Message) -> set[str]:
    """Ids of those objects of ``message`` that its receiver does not ask for."""
    if not message.has_content():
        return set()
    order = [part.object_id for part in iterate_object_tree(get_object_tree(message))]
    return set(known_objects(order, message_to_proto(remove_content_from_message(message))))


def _object(kind: str, child: str, body: bytes) -> bytes:
    """An object as Flower lays it out: its class, the ids of its parts, its length, its body."""
    head = HEAD_VALUE_DIVIDER.join((kind, child, str(len(body))))
    return bytes(head.encode() + HEAD_BODY_DIVIDER + body)
