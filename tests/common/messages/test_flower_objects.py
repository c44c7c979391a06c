"""What is not asked for is what Flower itself would have sent."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.common.messages.flower_objects import known_objects, unasked_objects


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def parts_of(message: Message) -> tuple[list[str], dict[str, bytes]]:
    message.metadata.__dict__["_message_id"] = message.object_id
    order = [part.object_id for part in iterate_object_tree(get_object_tree(message))]
    objects = get_all_nested_objects(message)
    return order, {name: each.deflate() for name, each in objects.items()}


def message_of(**records: ConfigRecord | ArrayRecord) -> Message:
    return Message(RecordDict(dict(records)), dst_node_id=7, message_type="query.keys", ttl=20.0)


def offer_of(message: Message) -> ProtoMessage:
    offer: ProtoMessage = message_to_proto(remove_content_from_message(message))
    return offer


@pytest.mark.parametrize("payload", [{}, {"kind": "KeysAsk", "blob": b"\x00" * 1000}])
def test_record_and_head_of_a_message_are_known(payload: dict[str, str | bytes]) -> None:
    message = message_of(payload=ConfigRecord(dict(payload)))
    order, content = parts_of(message)
    offered = offer_of(message)
    assert known_objects(order, offered) == {name: content[name] for name in order[1:]}
    assert known_objects(order, None) == {}


def test_what_has_another_hash_is_asked_for() -> None:
    message = message_of(other=ConfigRecord({"kind": "KeysAsk"}))
    order, _ = parts_of(message)
    offered = offer_of(message)
    offered.metadata.ttl += 1
    assert known_objects(order, offered) == {}


def test_a_message_with_arrays_is_asked_for() -> None:
    arrays = ArrayRecord([np.ones(3, np.float32)])
    message = message_of(payload=ConfigRecord({}), arrays=arrays)
    order, _ = parts_of(message)
    assert known_objects(order, offer_of(message)) == {}
    assert known_objects([], offer_of(message)) == {}


def test_what_the_receiver_does_not_ask_for_is_not_sent() -> None:
    """Else it may come after the receiver has confirmed, when nobody takes it any more."""
    message = message_of(payload=ConfigRecord({"kind": "KeysAsk"}))
    order, _ = parts_of(message)
    assert unasked_objects(message) == set(order[1:])
    arrays = ArrayRecord([np.ones(3, np.float32)])
    large = message_of(payload=ConfigRecord({}), arrays=arrays)
    parts_of(large)
    assert unasked_objects(large) == set()
    error = Message(Error(1), reply_to=message)
    parts_of(error)
    assert unasked_objects(error) == set()
