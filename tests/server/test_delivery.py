"""At the end of a run every site is told what it came to; who is away is waited for a while."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from support.federations import digits_job
from support.scripted_grid import Answer, Clock, ScriptedGrid, site

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.sections import EarlyStopping
from fedgraft.common.messages.codec import decode, encode
from fedgraft.common.messages.payloads import Refusal, ResultReply, ResultRequest
from fedgraft.server.delivery import PATIENCE, hand_over
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.runs.summary import partner_facts
from fedgraft.server.state import RoundRecord, State


class Ended:
    """A run of two rounds with three sites, that is over."""

    def __init__(self, folder: Path) -> None:
        self.job = digits_job("rounds.deadline='600s'", "rounds.min_sites=2")
        bench = open_workbench(self.job)
        self.run = Run.create(folder, self.job)
        self.plan: Plan = make_plan(self.job, bench, self.run.session)
        self.final = bench.initial_of(self.plan.exchanged)
        for number in (1, 2):
            validation = {"accuracy": number / 4, "macro_f1": 0.1, "loss": 1.0, "examples": 8}
            record = RoundRecord(
                number, 3, 3, (), 20, 0.5, 0.1, validation if number == 1 else None, 10, 10, 1.0
            )
            self.run.commit(State(number, self.final), record, self.plan.exchanged)
        self.clock = Clock()

    def keeps(self, name: str, log: list[ResultRequest] | None = None) -> Answer:
        """A site that takes part and keeps the result."""

        def answer(message: Message) -> RecordDict:
            request = decode(message.content, ResultRequest)
            if log is not None:
                log.append(request)
            return encode(ResultReply(request.session))

        return self.member(name, answer)

    def member(self, name: str, reply: Answer) -> Answer:
        return _with_session(site(name, reply), self.run.session)

    def hand_over(self, nodes: dict[int, Answer]) -> dict[str, Any]:
        grid = ScriptedGrid(nodes)
        transport = Transport(grid, clock=self.clock, pause=self.clock.pause)
        return hand_over(
            self.plan,
            transport,
            self.run,
            self.final,
            clock=self.clock,
            pause=self.clock.pause,
        )


def _with_session(answer: Answer, session: str) -> Answer:
    def said(message: Message) -> Any:
        from fedgraft.common.messages.payloads import PlanReply

        record = answer(message)
        if isinstance(record, RecordDict) and record["payload"]["kind"] == "PlanReply":
            return encode(replace(decode(record, PlanReply), session=session))
        return record

    return said


def test_every_site_gets_the_final_adapter_and_the_rounds(tmp_path: Path) -> None:
    ended, log = Ended(tmp_path), []  # type: ignore[var-annotated]
    nodes = {11 + at: ended.keeps(name, log) for at, name in enumerate("abc")}
    assert ended.hand_over(nodes) == {"sites": ["a", "b", "c"], "missing": []}
    assert ended.clock.now < 101
    assert len(log) == 3
    request = log[0]
    assert (request.run, request.round, request.sites) == (ended.run.name, 2, 3)
    assert np.array_equal(request.adapter, ended.final)
    assert [line.accuracy for line in request.rounds[:1]] == [0.25]
    assert np.isnan(request.rounds[1].accuracy)
    event = ended.run.events()[-1]
    assert event["event"] == "handed-over"
    assert event["bytes_down"] > 3 * ended.final.nbytes


def test_a_site_that_is_away_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    nodes = {11: ended.keeps("a"), 12: ended.keeps("b")}
    assert ended.hand_over(nodes) == {"sites": ["a", "b"], "missing": []}
    assert PATIENCE - 10 <= ended.clock.now - 100 <= PATIENCE + 1


def test_a_site_that_comes_back_gets_it(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    nodes = {11: ended.keeps("a"), 12: ended.keeps("b")}

    class Returning(Clock):
        def pause(self, seconds: float) -> None:
            super().pause(seconds)
            if self.now > 130:
                nodes[13] = ended.keeps("c")

    ended.clock = Returning()
    assert ended.hand_over(nodes)["sites"] == ["a", "b", "c"]
    assert ended.clock.now < 150


def test_a_site_that_refuses_is_not_asked_again(tmp_path: Path) -> None:
    ended, asked = Ended(tmp_path), []

    def refuse(message: Message) -> RecordDict:
        asked.append(message)
        return encode(Refusal(ended.run.session, "run-name-taken"))

    nodes = {11: ended.keeps("a"), 12: ended.keeps("b"), 13: ended.member("c", refuse)}
    missing = [{"site": "c", "reason": "run-name-taken"}]
    assert ended.hand_over(nodes) == {"sites": ["a", "b"], "missing": missing}
    assert len(asked) == 1


def test_a_site_that_never_answers_is_named(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    nodes = {11: ended.keeps("a"), 12: ended.keeps("b"), 13: ended.member("c", lambda _: None)}
    assert ended.hand_over(nodes)["missing"] == [{"site": "c", "reason": "silent"}]


def test_the_figure_of_a_run_is_that_of_the_round_that_counts(tmp_path: Path) -> None:
    ended, handed = Ended(tmp_path), {"sites": ["a"], "missing": []}
    facts = partner_facts(ended.run, handed)["partners"]
    assert facts["validation"] is None  # round 2 was not evaluated, and round 1 had another adapter
    assert facts["sites"] == ["a"]
    for number, accuracy, loss in ((3, 0.8, 0.5), (4, 0.6, 0.4)):
        validation = {"accuracy": accuracy, "macro_f1": accuracy, "loss": loss, "examples": 8}
        record = RoundRecord(number, 3, 3, (), 20, 0.5, 0.1, validation, 10, 10, 1.0)
        ended.run.commit(State(number, ended.final), record, ended.plan.exchanged)

    def counted(stopping: EarlyStopping | None) -> float:
        rounds = ended.job.rounds.model_copy(update={"early_stopping": stopping})
        ended.run.job = ended.job.model_copy(update={"rounds": rounds})
        found = partner_facts(ended.run, handed)["partners"]["validation"]["accuracy"]
        return float(found)

    assert counted(None) == 0.6
    assert counted(EarlyStopping(metric="accuracy")) == 0.8
    assert counted(EarlyStopping(metric="loss")) == 0.6
    assert counted(EarlyStopping(metric="loss", min_delta=0.2)) == 0.8
