"""Every verb that takes a job or a run works for a run of any task, or says why it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from support.contract import Federation, card_model, outputs, same
from support.contract_tasks import TaskCase
from typer.testing import CliRunner

from fedgraft.client.cli.results import results
from fedgraft.client.doctor.data_summary import survey
from fedgraft.client.site_config import dump_site
from fedgraft.common.config.compatibility import refusal_of
from fedgraft.common.config.jobfile import dump_job, load_job
from fedgraft.common.console import Console
from fedgraft.common.errors import InputError, JobError
from fedgraft.server.cli import jobs
from fedgraft.server.cli.explain import explain
from fedgraft.server.export.attribution import EXPLAINERS
from fedgraft.simulations.cli.check import check
from fedgraft.simulations.cli.simulate import simulate
from fedgraft.simulations.selection.rank import select


def call(verb: Callable[..., None], *arguments: object) -> str:
    """What the verb prints."""
    app = typer.Typer()
    app.command()(verb)
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_job_file_says_what_the_job_costs(case: TaskCase, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(dump_job(case.job), encoding="utf-8")
    assert load_job(path) == case.job
    told: dict[str, Any] = json.loads(call(check, path, "--json"))
    assert told["trained_parameters"] == case.federation.bench.layout.size
    assert [site["name"] for site in told["sites"]] == list(case.rows)
    assert told["estimated_memory_mb"] >= 350
    summary = case.federation.simulated.summary() or {}
    # A site's weight is written in as many bytes as it needs; beforehand nobody knows it.
    assert 0 <= summary["bytes_up_per_site_round"] - told["bytes_up_per_site_round"] <= 8


def test_runs_are_listed_with_the_share(federation: Federation) -> None:
    run, share = federation.simulated, federation.job.task.share
    final = (run.summary() or {})["final"]["federated"]
    told: dict[str, Any] = json.loads(call(jobs.runs, run.folder.parent, "--json"))
    (line,) = told["runs"]
    assert (line["run"], line["share_name"]) == (run.name, share.name)
    assert line["share"] == final[share.key]
    shown = call(jobs.runs, run.folder.parent)
    assert share.text(final[share.key]) in " ".join(shown.split())


def test_a_finished_run_is_shown_again(federation: Federation) -> None:
    run, metric = federation.simulated, federation.job.task.metrics[0]
    shown = " ".join(call(simulate, "--resume", run.folder, "--quiet").split())
    assert f"{metric.title} on each site's own test set" in shown
    final = (run.summary() or {})["final"]["federated"]
    assert metric.text(final[metric.key], unit="") in shown


@pytest.mark.slow
def test_a_report_is_written_again_to_the_byte(federation: Federation) -> None:
    folder = federation.simulated.folder
    page = (folder / "report.html").read_bytes()
    call(jobs.report, folder)
    assert (folder / "report.html").read_bytes() == page


def test_the_merged_model_computes_the_same(case: TaskCase, tmp_path: Path) -> None:
    federation = case.federation
    call(jobs.export, federation.simulated.folder, "--merge", "--out", tmp_path / "merged")
    inputs = case.inputs
    bench = federation.bench
    bench.put((federation.exchanged, federation.adapter))
    trained = outputs(bench.model, inputs)
    bench.put()
    assert same(outputs(card_model(tmp_path / "merged"), inputs), trained, 1e-4)


def test_a_site_lists_and_shows_its_results(federation: Federation, tmp_path: Path) -> None:
    run, folder = federation.handed_over, federation.reported
    site = federation.site(run)
    here = {"state": str(site.state), "device": "cpu"}
    (tmp_path / "site.toml").write_text(dump_site(site.config.model_copy(update=here)))
    at = ("--site", tmp_path / "site.toml")
    assert run.name[:20] in call(results, *at).replace("\n", "")
    told: dict[str, Any] = json.loads(call(results, run.name, "--json", *at))
    assert told["folder"] == str(folder) and told["models"]["federated"]
    assert site.config.name in told["verdict"]


def test_the_doctor_knows_the_columns(case: TaskCase) -> None:
    seen = survey(str(case.folder / "sites" / "ash" / "train" / "rows.jsonl"), {})
    assert (seen.state, seen.hint) == ("ok", "")
    assert seen.what.startswith(f"{len(case.rows['ash']['train'])} rows")


@pytest.mark.slow
def test_backbones_are_ranked_or_that_is_refused(case: TaskCase) -> None:
    def rank() -> Any:
        return select(case.job, {"tiny": lambda: case.job}, console=Console(quiet=True))

    if "selection" in case.task.refuses:
        with pytest.raises(JobError) as caught:
            rank()
        assert case.task.name in str(caught.value) and caught.value.hint
        return
    found = rank()
    assert not found.failed and np.isfinite(found.scored[0].logme)


def test_an_answer_is_explained_or_that_is_refused(case: TaskCase, tmp_path: Path) -> None:
    run, content = case.federation.simulated, case.rows["ash"]["test"][0][case.task.content]
    given: object = "the cat sees a dog"
    if case.task.modality.files:
        given = tmp_path / "cell"
        (tmp_path / "cell").write_bytes(content["bytes"])
    arguments = (run.folder, given, "--out", tmp_path / "heat.png", "--json")
    refused = refusal_of(case.job, "explanation")
    if refused or case.task.modality.name not in EXPLAINERS:
        with pytest.raises(InputError) as caught:
            call(explain, *arguments)
        found = str(caught.value), caught.value.hint
        assert found == refused if refused else case.task.name in found[0] and found[1]
        return
    told: dict[str, Any] = json.loads(call(explain, *arguments))
    assert told["label"] in case.job.job.labels and 0 < told["probability"] <= 1
