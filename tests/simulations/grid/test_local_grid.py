"""The local grid: nodes with states of their own, replies in the order of the messages."""

import os
import time
from collections.abc import Sequence

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers


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


def answer(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Say beside that who was asked together."""
    replies = [app(message, context) for message, context in asked]
    if len(asked) == 1:
        return replies
    names = "".join(str(context.node_config["site"]) for _, context in asked)
    for reply in replies:
        reply.content["said"]["group"] = names
    return replies


def ask(grid: LocalGrid, nodes: Sequence[int], *does: str) -> list[Message]:
    messages = [
        Message(RecordDict({"ask": ConfigRecord({"do": do})}), node, "train")
        for node, do in zip(nodes, does, strict=True)
    ]
    return list(grid.send_and_receive(messages))


def counts(replies: Sequence[Message]) -> list[tuple[object, object]]:
    return [(reply.content["said"]["site"], reply.content["said"]["asked"]) for reply in replies]


def open_grid(
    workers: Workers, sites: str = "abc", *, together: int = 1
) -> tuple[LocalGrid, list[int]]:
    grid = LocalGrid([{"site": site} for site in sites], workers, answer=answer, together=together)
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


# Groups


def groups(replies: Sequence[Message]) -> list[str]:
    """Whom each was asked together with."""
    told = [reply.content["said"] for reply in replies]
    return [str(one.get("group", one["site"])) for one in told]


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    ("together", "wanted"),
    [
        (1, ["a", "b", "c", "d", "e", "f", "g"]),
        (3, ["abc"] * 3 + ["def"] * 3 + ["g"]),
        (6, ["abcdef"] * 6 + ["g"]),
        (7, ["abcdefg"] * 7),
        (50, ["abcdefg"] * 7),
    ],
)
def test_nodes_are_asked_to_train_in_groups(count: int, together: int, wanted: list[str]) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers, "abcdefg", together=together)
        for number in (1, 2):
            replies = ask(grid, nodes, *[""] * 7)
            assert groups(replies) == wanted
            assert counts(replies) == [(site, number) for site in "abcdefg"]
            assert len({reply.metadata.reply_to_message_id for reply in replies}) == 7
            assert len({reply.metadata.message_id for reply in replies}) == 7


@pytest.mark.parametrize("count", [0, 2])
def test_groups_answer_in_the_order_of_the_messages(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers, "abcdef", together=2)
        replies = ask(grid, nodes[::-1], "slow", "", "", "", "", "slow")
        assert [site for site, _ in counts(replies)] == list("fedcba")
        assert groups(replies) == ["fe", "fe", "dc", "dc", "ba", "ba"]
        replies = ask(grid, nodes[1:4], *[""] * 3)  # who is in a group may change
        assert counts(replies) == [("b", 2), ("c", 2), ("d", 2)]
        assert groups(replies) == ["bc", "bc", "d"]


def send(grid: LocalGrid, *parts: tuple[int, str]) -> list[Message]:
    content = RecordDict({"ask": ConfigRecord({"do": ""})})
    messages = [Message(content, node, kind) for node, kind in parts]
    return list(grid.send_and_receive(messages))


def test_only_messages_that_ask_to_train_are_answered_together() -> None:
    with Workers(0, device="cpu") as workers:
        grid, (a, b, c, d, e, f) = open_grid(workers, "abcdef", together=3)
        kinds = ["train", "train", "evaluate", "train", "train", "train"]
        replies = send(grid, *zip((a, b, c, d, e, f), kinds, strict=True))
        assert groups(replies) == ["ab", "ab", "c", "def", "def", "def"]
        replies = send(grid, *((node, "query.plan") for node in (a, b, c)))
        assert groups(replies) == ["a", "b", "c"]
        replies = send(grid, (a, "evaluate"), (b, "evaluate"), (c, "train"), (d, "train"))
        assert groups(replies) == ["a", "b", "cd", "cd"]
        assert counts(replies) == [("a", 3), ("b", 3), ("c", 3), ("d", 2)]


def test_a_group_is_of_messages_that_were_sent_together() -> None:
    with Workers(0, device="cpu") as workers:
        grid, nodes = open_grid(workers, "abcd", together=3)
        content = RecordDict({"ask": ConfigRecord({"do": ""})})
        waiting = [
            identifier
            for pair in (nodes[:2], nodes[2:])
            for identifier in grid.push_messages([Message(content, n, "train") for n in pair])
        ]
        replies: list[Message] = []
        while len(replies) < 4:
            replies += grid.pull_messages(waiting[len(replies) :])
        assert groups(replies) == ["ab", "ab", "cd", "cd"]


@pytest.mark.parametrize("count", [0, 2])
def test_a_group_that_fails_fails_by_itself_and_its_nodes_keep_their_states(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        grid, nodes = open_grid(workers, "abcdef", together=2)
        replies = ask(grid, nodes, "", "", "", "fail", "", "forget")
        assert [reply.has_error() for reply in replies] == [False] * 2 + [True] * 2 + [False] * 2
        for reply in replies[2:4]:
            assert reply.error.code == 2 and reply.error.reason == "ValueError"
        assert len({reply.metadata.reply_to_message_id for reply in replies}) == 6
        replies = ask(grid, nodes, *[""] * 6)
        assert counts(replies) == [(s, 1 if s == "f" else 2) for s in "abcdef"]
