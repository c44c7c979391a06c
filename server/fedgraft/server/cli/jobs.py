"""The coordinator's verbs: write a job, check it, list and report runs, export their adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError, RunError
from fedgraft.server.cli.options import JobFile, Json, Overrides

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job
    from fedgraft.server.runs.run_folder import Run

__all__ = ["check", "check_job", "export", "init", "report", "runs", "show_check"]

TEMPLATES = {file.stem: file for file in sorted(Path(__file__).parents[1].glob("templates/*.toml"))}

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("job.toml"),
    template: Annotated[
        str, typer.Option(help=f"{', '.join(list(TEMPLATES)[:-1])} or {list(TEMPLATES)[-1]}.")
    ] = "text",
    as_json: Json = False,
) -> None:
    """Write a commented job file to start from."""
    if template not in TEMPLATES:
        raise InputError(f"no template {template}", hint=f"there is: {', '.join(TEMPLATES)}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATES[template].read_text(encoding="utf-8"))
    except FileExistsError:
        raise InputError(f"{path} exists already", hint="name another file") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}", hint="check the folder"
        ) from None
    console = Console(as_json=as_json)
    console.json({"job": str(path), "template": template})
    console.text(f"wrote {path}\nnext: edit it, then fedgraft check {path}")


def check(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Validate a job, its backbone and its data without training; say what it will cost."""
    from fedgraft.common.config.jobfile import load_job

    loaded = load_job(job, tuple(overrides or ()))
    show_check(Console(as_json=as_json), check_job(loaded), loaded.rounds.count)


def check_job(job: "Job") -> dict[str, Any]:
    """Open the job's backbone and count what a round of it would train, send and hold.

    Sites are not checked, because their data are elsewhere; ``sites`` is empty.

    Raises:
        FedgraftError: the backbone, or an adapter to start from, does not fit the job.
    """
    from fedgraft.common.adapters.model import open_workbench
    from fedgraft.server.plan import make_plan
    from fedgraft.server.runs.costs import estimate_costs
    from fedgraft.server.runs.protection import protection_facts

    bench = open_workbench(job)
    costs = estimate_costs(make_plan(job, bench, session=""), bench)
    return {
        "job": job.job.name,
        "backbone": job.backbone.source,
        "fingerprint": bench.backbone.fingerprint,
        "trained_parameters": costs.trained_parameters,
        "exchanged_parameters": costs.exchanged_parameters,
        "total_parameters": costs.total_parameters,
        "bytes_up_per_site_round": costs.bytes_up,
        "bytes_down_per_site_round": costs.bytes_down,
        "estimated_memory_mb": round(costs.memory_mb),
        "zero_shot": not bench.fresh_head,
        "protection": protection_facts(job, []),
        "sites": [],
        "skipped_files": 0,
        "data_notes": [],
        "warnings": _warnings(job),
    }


def _warnings(job: "Job") -> list[str]:
    """Return what is allowed, and has ruined runs."""
    from fedgraft.common.config.sections import TOO_FAR

    optimizer = job.aggregation.server_optimizer
    if optimizer.reach <= TOO_FAR:
        return []
    return [
        f"{optimizer.kind} with learning_rate = {optimizer.learning_rate:g} can move the adapter "
        f"{optimizer.reach:,.0f} times as far in a round as the sites do: the run may diverge. "
        "Without aggregation.server_optimizer.learning_rate a rate is chosen that cannot"
    ]


def show_check(console: Console, facts: dict[str, Any], rounds: int) -> None:
    """Print what ``check_job`` found, and the sites of a simulation if there are any."""
    console.json(facts)
    share = 100 * facts["trained_parameters"] / facts["total_parameters"]
    up, down = facts["bytes_up_per_site_round"], facts["bytes_down_per_site_round"]
    rows = [
        ["backbone", f"{facts['backbone']}, {facts['total_parameters']:,} parameters"],
        ["trained", f"{facts['trained_parameters']:,} parameters ({share:.2f} %)"],
        ["sent by a site", f"{up:,} bytes a round, {up * rounds / 1e6:,.1f} MB in all"],
        ["sent to a site", f"{down:,} bytes a round, {down * rounds / 1e6:,.1f} MB in all"],
        ["memory at a site", f"about {facts['estimated_memory_mb']:,} MB"],
        ["protection", _protection(facts["protection"])],
        ["zero-shot", "yes: the head knows these labels" if facts["zero_shot"] else "no"],
    ]
    if facts["sites"]:
        counts = sorted(site["examples"] for site in facts["sites"])
        text = f"{len(counts)} sites with {counts[0]:,} to {counts[-1]:,} training examples"
        rows.append(["simulation", text])
    rows += [["data", note] for note in facts["data_notes"]]
    rows += [["warning", text] for text in facts["warnings"]]
    console.table(f"{facts['job']}: valid", ["what", "how much"], rows)


def _protection(facts: dict[str, Any]) -> str:
    if facts["protocol"] == "none":
        return "none: the coordinator sees each site's update"
    return (
        f"secure aggregation: the coordinator sees sums ({facts['ring_bits']}-bit ring, "
        f"clip {facts['clip']:g})"
    )


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs and what they came to."""
    from fedgraft.server.runs.run_folder import list_runs

    console = Console(as_json=as_json)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}", hint="`fedgraft simulate` makes one")
    found = [_run_line(run) for run in list_runs(folder)]
    console.json({"runs": found})
    rows = [
        [
            line["run"],
            line["created"][:16].replace("T", " "),
            f"{line['rounds']}/{line['of_rounds']}",
            "-" if line["share"] is None else f"{100 * line['share']:.1f} %",
            line["share_name"],
            line["status"],
        ]
        for line in found
    ]
    console.table(f"Runs in {folder}", ["run", "started", "rounds", "result", "of", "status"], rows)


def _run_line(run: "Run") -> dict[str, Any]:
    summary = run.summary()
    final = (summary or {}).get("final", {}).get("federated")
    return {
        "run": run.name,
        "folder": str(run.folder),
        "created": run.created,
        "rounds": len(run.history()),
        "of_rounds": run.job.rounds.count,
        "accuracy": final and final.get("accuracy"),
        "share": final and final.get(run.job.task.share.key),
        "share_name": run.job.task.share.name,
        "status": "finished" if summary else "not finished",
    }


def report(run: RunFolder, as_json: Json = False) -> None:
    """Write a run's report.html again."""
    from fedgraft.server.report.page import write_report
    from fedgraft.server.runs.run_folder import Run

    opened = Run(run)
    summary = opened.summary()
    if summary is None:
        go_on = (
            f"continue it: fedgraft simulate --resume {run}"
            if opened.job.simulation
            else "the coordinator goes on with it: fedgraft coordinator status"
        )
        raise RunError(f"{run} has not finished", hint=go_on)
    path = write_report(opened.folder, summary, opened.history())
    console = Console(as_json=as_json)
    console.json({"run": opened.name, "report": str(path)})
    console.text(f"wrote {path}")


def export(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; RUN/export-FORMAT if absent.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="peft or onnx.")] = "peft",
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the backbone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's adapter as a PEFT folder, or the whole model with it merged in.

    --format onnx is the merged model as an ONNX graph, checked against PyTorch.
    """
    if form not in ("peft", "onnx"):
        raise InputError(f"no format {form}", hint="--format peft or onnx, or --merge")
    from fedgraft.server.export.adapter import export_adapter, export_merged
    from fedgraft.server.runs.reopen import reopen

    opened = reopen(run)
    if form == "onnx":
        from fedgraft.server.export.onnx import export_onnx

        write, name, merge = export_onnx, "onnx", True
    else:
        write, name = (export_merged, "merged") if merge else (export_adapter, "peft")
    folder = out or opened.run.folder / f"export-{name}"
    write(opened.run, opened.bench, opened.exchanged, opened.adapter, folder)
    console = Console(as_json=as_json)
    console.json({"run": opened.run.name, "folder": str(folder), "merged": merge, "format": form})
    console.text(f"wrote {folder}")
