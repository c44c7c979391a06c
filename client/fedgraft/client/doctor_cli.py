"""`fedgraft site doctor`: everything a round needs, tried before there is one."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console

__all__ = ["doctor"]


def doctor(
    site: Annotated[Path, typer.Option("--site", help="The site's own configuration.")] = Path(
        "site.toml"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check what taking part needs; changes nothing. Exit code 1 if a check failed."""
    from fedgraft.client.doctor import FAILED, examine

    console = Console(as_json=as_json)
    found = list(examine(site))
    healthy = not any(one.state == FAILED for one in found)
    console.json({"healthy": healthy, "findings": [asdict(one) for one in found]})
    rows = [[one.name, one.state, one.what] for one in found]
    console.table("Doctor", ["check", "", "what was seen"], rows)
    for one in found:
        if one.hint:
            console.text(f"{one.name}: {one.hint}")
    if not healthy:
        raise typer.Exit(1)
