"""Arguments and options that several verbs of the coordinator have."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["HERE", "HomeFolder", "JobFile", "Json", "Overrides"]

HERE = Path("coordinator")  # where the coordinator's folder is if nobody says

HomeFolder = Annotated[Path, typer.Option("--home", help="The coordinator's folder.")]
JobFile = Annotated[Path, typer.Argument(help="Job file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. rounds.count=5."),
]
