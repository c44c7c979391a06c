"""``fedgraft site results``: the results of runs, and whether each was worth it for this site."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

if TYPE_CHECKING:
    from fedgraft.client.results.store import Result

__all__ = ["results"]


def results(
    run: Annotated[str, typer.Argument(help="A run; all of them are listed without one.")] = "",
    site: Annotated[Path, typer.Option(help="The site's configuration.")] = Path("site.toml"),
    out: Annotated[
        Path | None, typer.Option(help="Copy adapter and report into this new folder.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Compare with training alone, here and now.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the results of runs; show one, measure it again, or copy it out."""
    from fedgraft.client.results.store import find_result, list_results
    from fedgraft.client.site_config import load_site

    state, console = Path(load_site(site).state), Console(as_json=as_json)
    if not run:
        if out or measure:
            raise InputError("of which run?", hint="fedgraft site results lists them")
        found = list_results(state)
        console.json({"results": [_line(one) for one in found]})
        console.table("Results", ["run", "received", "verdict"], [_row(one) for one in found])
        return
    result = find_result(state, run)
    if measure:
        _measure(site, result)
    if out is not None:
        _copy(result, out)
    line = _line(result)
    console.json(line)
    console.text(f"{line['verdict']}\nadapter and report: {out or result.folder}")


def _line(result: "Result") -> dict[str, Any]:
    from fedgraft.client.results.report import read_report

    report = read_report(result.folder) or {}
    return {
        "run": result.run,
        "received": result.received,
        "folder": str(result.folder),
        "outcome": report.get("outcome"),
        "verdict": report.get("verdict", f"not measured yet: results {result.run} --measure"),
        "models": report.get("models"),
    }


def _row(result: "Result") -> list[str]:
    line = _line(result)
    return [line["run"], line["received"][:16].replace("T", " "), line["outcome"] or "not measured"]


def _measure(site: Path, result: "Result") -> None:
    from fedgraft.client.membership.state_files import BACKBONES
    from fedgraft.client.participant import open_participant
    from fedgraft.client.results.compare import compare
    from fedgraft.client.results.report import write_report
    from fedgraft.common.backbones.blob_store import set_store
    from fedgraft.common.files import lock_folder

    at = open_participant({"site": str(site.resolve())})
    set_store(at.state / BACKBONES)
    with lock_folder(result.folder):
        write_report(result.folder, compare(at, result))


def _copy(result: "Result", out: Path) -> None:
    import shutil

    if out.exists():
        raise InputError(f"{out} exists", hint="name a new folder")
    try:
        shutil.copytree(result.folder, out, ignore=shutil.ignore_patterns("lock", ".*"))
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror}", hint="name another folder"
        ) from None
