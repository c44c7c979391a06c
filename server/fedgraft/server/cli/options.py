"""Arguments and options that several verbs of the coordinator share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["HERE", "HomeFolder", "JobFile", "Json", "Overrides"]

HERE = Path("coordinator")  # the default folder of the coordinator

HomeFolder = Annotated[Path, typer.Option("--home", help="The coordinator's folder.")]
JobFile = Annotated[Path, typer.Argument(help="Job file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. rounds.count=5."),
]
