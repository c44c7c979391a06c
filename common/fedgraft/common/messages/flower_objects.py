"""Flower's objects that need no request, because the receiver knows their content.

Flower moves a message as a tree of objects. The SHA-256 of an object's content is its id, and each
object costs a request of its own. At a SuperLink, requests cost more than anything else in a round.
Most of our messages (``codec.py``) are three objects: the payload, the record that contains the
payload's id, and the message's head. The record contains only this id, and the head contains only
data that came with the offer of the message. So the receiver makes both itself, and uses them if
their hash is the offered id.

The sender must also not send the objects that the receiver makes itself. The receiver takes the
message as soon as it has the other objects; then the SuperLink forgets all objects of the message
and refuses those that arrive later.
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
    """Return the content, by id (hex SHA-256), of those objects of a message that need no request.

    ``identifiers`` are the ids of all its objects; a part comes before the object that contains it.
    ``offered`` is the message without its content, if available.
    """
    if len(identifiers) != 3 or offered is None:
        return {}  # large arrays add objects: the record has several ids
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
    """Return the ids of those objects of ``message`` that its receiver does not request."""
    if not message.has_content():
        return set()
    order = [part.object_id for part in iterate_object_tree(get_object_tree(message))]
    return set(known_objects(order, message_to_proto(remove_content_from_message(message))))


def _object(kind: str, child: str, body: bytes) -> bytes:
    """Return an object in Flower's layout: its class, the ids of its parts, its length, body."""
    head = HEAD_VALUE_DIVIDER.join((kind, child, str(len(body))))
    return bytes(head.encode() + HEAD_BODY_DIVIDER + body)
