"""``fedgraft site doctor``: check everything that a round needs, before the first round."""

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
    job: Annotated[
        str, typer.Option(help="Try this site's data with a job: its file, or the id of its run.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check everything that taking part needs; change nothing. Exit code 1 if a check failed."""
    from fedgraft.client.doctor.checklist import CHECKS, examine
    from fedgraft.client.doctor.local import FAIL

    console = Console(as_json=as_json)
    width = max(len(check.name) for check in CHECKS)
    found = []
    for one in examine(site, job=job):  # print each line at once: some checks take seconds
        found.append(one)
        console.text(f"{one.state:<8}{one.name:<{width + 2}}{one.what}")
    healthy = not any(one.state == FAIL for one in found)
    console.json({"healthy": healthy, "findings": [asdict(one) for one in found]})
    hints = [one for one in found if one.hint]
    console.text("\nhints" if hints else "")
    for one in hints:
        console.text(f"  {one.name}: {one.hint}")
    if not healthy:
        raise typer.Exit(1)
