"""``fedgraft select``: read a job and backbones, print a table ranked by transferability."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError
from fedgraft.simulations.cli.simulate import DEMO

if TYPE_CHECKING:
    from fedgraft.common.config.job import Job
    from fedgraft.simulations.selection.rank import Selection

__all__ = ["select"]

RANDOM = "random:"


def select(
    job: Annotated[
        Path | None, typer.Argument(help="Job file; without one, the built-in federation.")
    ] = None,
    backbones: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Candidates as in backbone.source; random:SOURCE is SOURCE without its "
            "weights. Default: the job's own.",
        ),
    ] = "",
    shots: Annotated[
        str,
        typer.Option(
            metavar="K,K,...",
            help="Also test with so many examples of each label at every site, and no training; "
            "0 is by the labels' names.",
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. simulation.sites=5."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Rank backbones for a job by how well they should transfer to it, before any training."""
    console = Console(as_json=as_json, quiet=quiet)
    wanted = _shots(shots)
    console.note("loading torch and transformers ...")
    from fedgraft.common.config.jobfile import load_job
    from fedgraft.simulations.selection.rank import select as select_backbones

    path, given = job or DEMO, tuple(overrides or ())
    loaded = load_job(path, given)
    names = [name.strip() for name in backbones.split(",") if name.strip()]
    candidates: dict[str, Callable[[], Job]] = {
        name: lambda name=name: load_job(path, (*given, *_sets(name)))  # type: ignore[misc]
        for name in names
    }
    own = f"{RANDOM if loaded.backbone.weights == 'random' else ''}{loaded.backbone.source}"
    found = select_backbones(
        loaded, candidates or {own: lambda: loaded}, shots=wanted, console=console
    )
    console.json(found.to_json())
    _show(console, found, wanted)
    return 2 if found.failed else 0


def _shots(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) < 10**6 for part in parts):
        raise InputError(f"--shots {text}: not a list of numbers", hint="--shots 0,1,5,20")
    return tuple(sorted({int(part) for part in parts}))


def _sets(name: str) -> tuple[str, str]:
    """Return the overrides that make ``name`` the job's backbone."""
    source = name.removeprefix(RANDOM)
    weights = "pretrained" if source == name else "random"
    return f"backbone.source={source}", f"backbone.weights={weights}"


def _show(console: Console, found: "Selection", shots: tuple[int, ...]) -> None:
    heads = any(one.leep is not None for one in found.scored)
    rows = [
        [
            str(place),
            *(_number(value) for value in (one.logme, one.h_score)),
            *(_number(value) for value in (one.leep, one.nce) if heads),
            *(_percent(one.accuracy[k]) for k in shots),
            f"{one.parameters / 1e6:,.1f}",
            one.backbone,
        ]
        for place, one in enumerate(found.scored, 1)
    ]
    scores = ("LogME", "H", "LEEP", "NCE") if heads else ("LogME", "H")
    columns = ["", *scores, *(f"{k}-shot" for k in shots), "M", "backbone"]
    title = f"Backbones by LogME on {found.sites:,} sites, the most promising first"
    console.table(title, columns, rows)
    console.text(f"H: H-score; {'k-shot: accuracy, %; ' if shots else ''}M: million parameters")
    if any(one.leep is None for one in found.scored):
        console.text("- : LEEP and NCE need a backbone with a classification head of its own")
    for one in found.failed:
        console.text(f"{one.backbone} does not fit: {one.error}")
        console.text(f"  hint: {one.hint}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
