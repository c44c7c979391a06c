"""The local grid: nodes with states of their own, replies in the order of the messages."""

import os
import time
from collections.abc import Sequence

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedgraft.simulations.grid import LocalGrid
from fedgraft.simulations.workers import Workers

APP = f"{__name__}:app"


def app(message: Message, context: Context) -> Message:
    """Count in the node's state what it was asked, and say so; ``do`` may be worse."""
    asked = int(context.state.get("memory", ConfigRecord({"asked": 0}))["asked"]) + 1
    context.state["memory"] = ConfigRecord({"asked": asked})
    do = str(message.content["ask"]["do"])
    if do == "fail":
        raise ValueError("patient Ada Lovelace")
    if do == "slow":
        time.sleep(0.3)
    if do == "forget":
        del context.state["memory"]
    said = {"asked": asked, "site": context.node_config["site"], "process": os.getpid()}
    return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)


def ask(grid: LocalGrid, nodes: Sequence[int], *does: str) -> list[Message]:
    messages = [
        Message(RecordDict({"ask": ConfigRecord({"do": do})}), node, "train")
        for node, do in zip(nodes, does, strict=True)
    ]
    return list(grid.send_and_receive(messages))


def counts(replies: Sequence[Message]) -> list[tuple[object, object]]:
    return [(reply.content["said"]["site"], reply.content["said"]["asked"]) for reply in replies]


def open_grid(workers: Workers, sites: str = "abc") -> tuple[LocalGrid, list[int]]:
    grid = LocalGrid([{"site": site} for site in sites], workers, app=APP)
    return grid, list(grid.get_node_ids())


@pytest.mark.parametrize("count", [0, 2])
def test_a_nodes_state_goes_from_message_to_message_and_to_no_other_node(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers)
        assert counts(ask(grid, nodes[:2], "", "")) == [("a", 1), ("b", 1)]
        assert counts(ask(grid, nodes, "", "", "")) == [("a", 2), ("b", 2), ("c", 1)]
        assert counts(ask(grid, nodes[1:2], "")) == [("b", 3)]


def test_a_state_goes_with_its_node_from_worker_to_worker() -> None:
    with Workers(2, device="cpu") as workers:
        grid, nodes = open_grid(workers)
        processes = set()
        for number in range(1, 9):
            replies = ask(grid, nodes, "slow" if number % 2 else "", "", "slow")
            assert [asked for _, asked in counts(replies)] == [number] * 3
            processes |= {reply.content["said"]["process"] for reply in replies}
    assert len(processes) == 2 and os.getpid() not in processes


@pytest.mark.parametrize("count", [0, 2])
def test_what_a_node_forgets_is_gone(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers)
        ask(grid, nodes, "", "forget", "")
        assert counts(ask(grid, nodes, "", "", "")) == [("a", 2), ("b", 1), ("c", 2)]


@pytest.mark.parametrize("count", [0, 2])
def test_a_node_that_fails_is_an_error_without_its_words_and_keeps_its_state(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers)
        replies = ask(grid, nodes, "", "fail", "")
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert replies[1].error.code == 2 and replies[1].error.reason == "ValueError"
        assert counts(ask(grid, nodes, "", "", "")) == [("a", 2), ("b", 2), ("c", 2)]


def test_two_grids_share_no_state() -> None:
    with Workers(0, device="cpu") as workers:
        one, nodes = open_grid(workers)
        ask(one, nodes, "", "", "")
        other, _ = open_grid(workers)
        assert counts(ask(other, nodes, "", "", "")) == [("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.parametrize("count", [0, 2])
def test_replies_come_in_the_order_of_the_messages(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers, "abcdef")
        replies = ask(grid, nodes[::-1], "slow", "", "", "slow", "", "")
        assert [site for site, _ in counts(replies)] == list("fedcba")
        assert len({reply.metadata.reply_to_message_id for reply in replies}) == 6


def test_without_workers_nothing_runs_before_its_reply_is_wanted() -> None:
    with Workers(0, device="cpu") as workers:
        grid, nodes = open_grid(workers)
        content = RecordDict({"ask": ConfigRecord({"do": ""})})
        first, second = grid.push_messages([Message(content, node, "train") for node in nodes[:2]])
        assert list(grid.pull_messages([second])) == []  # the oldest comes first
        assert counts(list(grid.pull_messages([first, second]))) == [("a", 1), ("b", 1)]
        assert list(grid.pull_messages([first])) == []
