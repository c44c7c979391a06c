"""``fedgraft simulate``: read a job file; write a run folder, a table and a report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job
    from fedgraft.common.metrics.metric import Metric
    from fedgraft.server.runs.run_folder import Run

__all__ = ["simulate"]

MANY_SITES = 30  # above, a row and a sentence per site fill the whole terminal
MODELS = {
    "federated": "fed.",
    "federated_tuned": "tuned",
    "local_only": "local",
    "head_only": "head",
    "zero_shot": "zero",
    "central": "central",
}
DEMO = Path(__file__).parents[1] / "demo" / "digits.toml"


def simulate(
    job: Annotated[
        Path | None, typer.Argument(help="Job file; without one, the built-in federation.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. rounds.count=5."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder that run folders go into.")] = Path("runs"),
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder instead of a new one.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="local (default), or ray (extra: simulation).")
    ] = None,
    sites_per_pass: Annotated[
        str | None, typer.Option(help="Sites trained in one pass: auto, or a number.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run a whole federation on this machine with the code that partner sites run."""
    console = Console(as_json=as_json, quiet=quiet)
    if engine not in (None, "local", "ray"):
        raise InputError(f"no engine {engine}", hint="--engine local or --engine ray")
    if sites_per_pass is not None:  # the job keeps it, so that a resumed run is the same
        overrides = [*(overrides or ()), f"simulation.sites_per_pass={sites_per_pass}"]
    if resume is not None and (job is not None or overrides):
        raise InputError(
            "a resumed run keeps its job", hint="give --resume alone, or start a new run"
        )
    console.note("loading torch and transformers ...")
    from fedgraft.common.config.jobfile import load_job
    from fedgraft.server.runs.run_folder import Run

    old = Run(resume) if resume else None
    if old is not None and (summary := old.summary()) is not None:
        console.note(f"{resume} is finished")
    else:
        engine = engine or (old.inputs.get("engine", "local") if old else "local")
        loaded = old.job if old else load_job(job or DEMO, tuple(overrides or ()))
        summary = _run(console, loaded, old, engine=engine, runs=runs)
    console.json(summary)
    _show(console, summary)


def _run(
    console: Console, job: "Job", old: "Run | None", *, engine: str, runs: Path
) -> dict[str, Any]:
    """Run ``job`` in a new folder below ``runs``, or continue ``old``; return the summary."""
    from fedgraft.server.runs.run_folder import Run
    from fedgraft.simulations.preparation import inputs_of, prepare
    from fedgraft.simulations.simulate import simulate as run_simulation

    prepared = prepare(job, engine, console)  # before the folder: bad input must leave no folder
    inputs = inputs_of(job, prepared, engine)
    with old or Run.create(runs, job, inputs) as run:
        run.expect(inputs)
        try:
            return run_simulation(prepared, run, console, engine=engine)
        except BaseException:
            console.note(f"continue with: fedgraft simulate --resume {run.folder}")
            raise


def _show(console: Console, summary: dict[str, Any]) -> None:
    if len(summary["sites"]) > MANY_SITES:
        _show_spread(console, summary)
    else:
        _show_sites(console, summary)
    console.text("")
    console.text(
        f"{summary['rounds']} rounds in {summary['seconds']:.0f} s, "
        f"{summary['peak_memory_mb']:.0f} MB; a site sent "
        f"{summary['bytes_up_per_site_round'] / 1000:.0f} kB a round"
    )
    if faults := summary.get("faults"):
        console.text(f"{faults['told']}; waiting for sites: {faults['waited']:,.0f} s, simulated")
    folder = summary["folder"]
    console.text(f"run: {folder}  report: {folder}/report.html")
    console.text(f"next: fedgraft export {folder}")


def _show_sites(console: Console, summary: dict[str, Any]) -> None:
    from fedgraft.common.metrics.verdict import COVERS  # scipy takes its time

    metric = _headline_metric(summary)

    def shown(models: dict[str, Any]) -> list[str]:
        return [_figure(metric, models.get(model)) for model in MODELS]

    rows = [
        [site["name"], str(site["examples"]), *shown(site), site["outcome"]]
        for site in summary["sites"]
    ]
    rows.append(
        ["pooled", str(sum(s["examples"] for s in summary["sites"])), *shown(summary["final"]), ""]
    )
    title = (
        f"{metric.title} on each site's own test set{_unit(metric)}, and whether federating helped"
    )
    console.table(title, ["site", "train", *MODELS.values(), "federating"], rows)
    for site in summary["sites"]:
        console.text(site["verdict"])
    console.text(COVERS)


def _show_spread(console: Console, summary: dict[str, Any]) -> None:
    """Print quantiles over all sites; they are too many for one row each."""
    from fedgraft.server.report.site_overview import QUANTILES, headline, spread

    sites, metric = summary["sites"], _headline_metric(summary)
    found = {model: spread(sites, model, metric.key) for model in MODELS}
    rows = [
        [
            MODELS[model],
            *(metric.text(value, unit="") for value in (*one.quantiles, one.mean)),
            f"{one.sites:,}",
            _figure(metric, summary["final"].get(model)),
        ]
        for model, one in found.items()
        if one is not None
    ]
    where = (
        f"on the own test sets of {len(sites):,} sites{_unit(metric)}, and on all of them pooled"
    )
    title = f"{metric.title} {where}"
    console.table(title, ["model", *QUANTILES, "mean", "sites", "pooled"], rows)
    console.text(headline(sites))
    console.text(f"every site: {summary['folder']}/summary.json")


def _headline_metric(summary: dict[str, Any]) -> "Metric":
    from fedgraft.common.tasks import TASKS

    return TASKS[summary["job"]["task"]].metrics[0]


def _unit(metric: "Metric") -> str:
    return " (%)" if metric.percent else ""


def _figure(metric: "Metric", found: dict[str, Any] | None) -> str:
    return metric.text(None if found is None else found[metric.key], unit="")
