"""A site measures for itself what a simulation measures for every site: the same numbers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from support.federations import digits_job, run_digits, write_digits
from typer.testing import CliRunner

from fedgraft.client.cli.results import results
from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.results.compare import compare, epochs_of
from fedgraft.client.results.report import read_report, write_report
from fedgraft.client.results.store import find_result, keep_result
from fedgraft.client.site_config import dump_site, load_site
from fedgraft.common.adapters.initial import starting_point
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.errors import BackboneError, FedgraftError, InputError
from fedgraft.common.messages.payloads import PastRound, ResultRequest, TrainRequest
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare


class Simulated:
    """A simulation, and one of its sites at the end of it."""

    def __init__(self, folder: Path, *overrides: str, site: int = 1) -> None:
        options = (
            *write_digits(folder / "digits", 90, 60),
            "simulation.baselines=['local_only', 'zero_shot']",
            *overrides,
        )
        self.run, self.summary = run_digits(folder / "runs", *options)
        self.job = digits_job(*options)
        prepared = prepare(self.job)
        self.expected: dict[str, Any] = self.summary["sites"][site]
        config = prepared.folder / prepared.sites[site].name / "site.toml"
        self.at = open_participant(
            {"site": str(config), "state": str(folder / "state"), "device": "cpu"}
        )
        self.path = folder / "site.toml"
        here = {"state": str(folder / "state"), "device": "cpu"}
        self.path.write_text(dump_site(load_site(config).model_copy(update=here)))
        bench = open_workbench(self.job)
        plan = self.plan = make_plan(self.job, bench, Run(self.run.folder).session)
        state = self.run.latest(plan.exchanged)
        assert state is not None
        self.request = ResultRequest(
            session=self.run.session,
            round=state.round,
            run="run-1",
            job=plan.request.job,
            names=plan.exchanged.names,
            sites=3,
            rounds=tuple(
                PastRound(line["round"], line["sites"], line["train_loss"], float("nan"))
                for line in self.run.history()
            ),
            adapter=state.final,
        )
        keep_result(self.at, self.request)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return Simulated(tmp_path_factory.mktemp("s"))


@pytest.fixture(scope="module")
def report(simulated: Simulated) -> dict[str, Any]:
    result = find_result(simulated.at.state, "run-1")
    found = compare(simulated.at, result)
    write_report(result.folder, found)
    return found


@pytest.mark.parametrize("model", ["federated", "local_only", "zero_shot"])
def test_a_site_finds_what_the_simulation_found(
    simulated: Simulated, report: dict[str, Any], model: str
) -> None:
    found, expected = report["models"][model], simulated.expected[model]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name


def test_and_comes_to_the_same_verdict(simulated: Simulated, report: dict[str, Any]) -> None:
    assert report["outcome"] == simulated.expected["outcome"]
    # There the sentence on the backbone untouched follows; a site's page has it apart.
    assert simulated.expected["verdict"].startswith(report["verdict"])
    assert report["comparisons"] == simulated.expected["comparisons"]
    assert set(report["comparisons"]) == {"local_only", "zero_shot"}
    assert report["tested_on"] == "test"
    assert report["test_examples"] == simulated.expected["test_examples"]


def test_the_report_is_written_for_people_and_machines(
    simulated: Simulated, report: dict[str, Any]
) -> None:
    folder = find_result(simulated.at.state, "run-1").folder
    page = (folder / "report.html").read_text()
    assert report["verdict"] in page and report["verdict"] in (folder / "report.md").read_text()
    assert not re.search(r"<script|src=|https?://", page)
    assert str(simulated.at.state) not in page  # no folder of this machine
    kept = read_report(folder)
    assert kept is not None
    assert kept["models"] == report["models"]
    assert kept["rounds"][0]["accuracy"] is None  # JSON has no NaN


def test_a_backbone_without_a_head_is_told_without_the_words_of_one_task(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    models = {**report["models"], "zero_shot": None}
    write_report(tmp_path, {**report, "models": models})
    page = (tmp_path / "report.html").read_text()
    assert "not measured: the backbone has no head of its own for this job" in page


def test_what_the_coordinator_says_cannot_become_markup(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    write_report(tmp_path, {**report, "backbone": "<script>alert(1)</script>"})
    assert "<script>" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_its_own_model_goes_on_from_the_earlier_adapter_too(
    simulated: Simulated, tmp_path: Path
) -> None:
    folder = simulated.run.folder / "adapter"
    later = Simulated(tmp_path, f"start.adapter={folder}", "rounds.count=1")
    result = find_result(later.at.state, "run-1")
    missed = compare(later.at, result)  # it was not there in round 1
    assert (missed["outcome"], missed["models"]["local_only"]) == ("unknown", None)
    start = starting_point(later.job, open_workbench(later.job), later.plan.exchanged)
    asked = TrainRequest(
        result.session, 1, 0, later.request.job, later.request.names, np.asarray(start)
    )
    next(later.at.train(asked))  # what it is to train with; it has kept what that begins with
    found = compare(later.at, result)
    for name, value in later.expected["local_only"].items():
        assert found["models"]["local_only"][name] == pytest.approx(value, abs=1e-4), name
    assert found["comparisons"] == later.expected["comparisons"]


@pytest.mark.slow
def test_a_site_without_test_or_validation_examples_says_so(tmp_path: Path) -> None:
    alone = Simulated(tmp_path, "data.validation=0")
    data = alone.at.config.data.model_copy(update={"test": None})
    alone.at.config = alone.at.config.model_copy(update={"data": data})
    found = compare(alone.at, find_result(alone.at.state, "run-1"))
    assert (found["outcome"], found["test_examples"]) == ("unknown", 0)
    assert set(found["models"].values()) == {None}
    write_report(tmp_path, found)
    assert "not known" in (tmp_path / "report.md").read_text()


def test_without_a_test_file_it_is_what_is_held_out(simulated: Simulated) -> None:
    data = simulated.at.config.data.model_copy(update={"test": None})
    at = Participant(simulated.at.config.model_copy(update={"data": data}), simulated.at.state)
    found = compare(at, find_result(at.state, "run-1"))
    assert found["tested_on"] == "validation"
    assert found["test_examples"] > 0


def test_another_backbone_is_noticed(simulated: Simulated) -> None:
    result = find_result(simulated.at.state, "run-1")
    object.__setattr__(result, "fingerprint", "f" * 64)
    with pytest.raises(BackboneError, match="has changed"):
        compare(simulated.at, result)


def test_epochs_are_those_of_the_federation() -> None:
    job = digits_job("rounds.count=10", "rounds.cohort=2", "training.epochs=3")
    assert epochs_of(job, 10, 4) == 15
    assert epochs_of(job, 10, 2) == 30
    assert epochs_of(job, 0, 4) == 3


# --- the command


def call(simulated: Simulated, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(results)
    return CliRunner().invoke(app, [*arguments, "--site", str(simulated.path)])


def test_results_are_listed_shown_and_copied_out(
    simulated: Simulated, report: dict[str, Any], tmp_path: Path
) -> None:
    (line,) = json.loads(call(simulated, "--json").stdout)["results"]
    assert (line["run"], line["outcome"]) == ("run-1", report["outcome"])
    out = tmp_path / "out"
    done = call(simulated, "run-1", "--out", str(out))
    assert report["verdict"] in " ".join(done.stdout.split())
    names = {path.name for path in out.iterdir()}
    assert {"adapter", "report.html", "report.md", "report.json"} <= names
    again = call(simulated, "run-1", "--out", str(out))
    assert isinstance(again.exception, InputError)
    assert isinstance(call(simulated, "nobody").exception, InputError)
    assert isinstance(call(simulated, "--measure").exception, FedgraftError)


def test_measuring_by_hand_gives_the_same(
    simulated: Simulated, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGRAFT_BACKBONES", "which is the site's own")
    done = call(simulated, "run-1", "--measure", "--json")
    assert json.loads(done.stdout)["models"]["local_only"] == report["models"]["local_only"]
