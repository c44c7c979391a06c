"""What a node remembers between messages is there until it is dropped, and then it is gone."""

import dataclasses

import pytest
from flwr.app import ConfigRecord, RecordDict
from support.payload_samples import MEMORY, SAMPLES, assert_equal, over_the_wire

from fedgraft.client.secagg.round_secrets import Memory
from fedgraft.common.errors import MessageError
from fedgraft.common.messages.codec import recall, remember


def test_a_memory_is_recalled_as_it_was() -> None:
    state = RecordDict({})
    remember(state, MEMORY)
    assert_equal(recall(over_the_wire(state), Memory), MEMORY)
    assert_equal(recall(state, Memory), MEMORY)  # and stays until it is dropped


def test_nothing_is_recalled_where_nothing_was_kept() -> None:
    assert recall(RecordDict({}), Memory) is None


def test_a_memory_that_is_dropped_leaves_no_secret_in_the_state() -> None:
    state = RecordDict({"other": ConfigRecord({"x": 1})})
    remember(state, MEMORY)
    remember(state, None)
    assert recall(state, Memory) is None
    assert list(state) == ["other"]
    remember(state, None)  # dropping nothing is no error


def test_only_the_latest_memory_is_kept() -> None:
    state = RecordDict({})
    remember(state, MEMORY)
    remember(state, dataclasses.replace(MEMORY, state=5, seed=b""))
    kept = recall(state, Memory)
    assert kept is not None
    assert (kept.state, kept.seed) == (5, b"")
    assert len(state) == 1


def test_something_else_is_not_recalled_as_a_memory() -> None:
    state = RecordDict({})
    remember(state, SAMPLES["Confirmation"])
    with pytest.raises(MessageError, match="not a Memory"):
        recall(state, Memory)
