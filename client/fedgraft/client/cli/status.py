"""``fedgraft site status``: what this site answered last, and why it refused."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console

__all__ = ["status"]


def status(
    site: Annotated[Path, typer.Option(help="The site's configuration.")] = Path("site.toml"),
    count: Annotated[int, typer.Option(help="The most reasons to show.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show why this site refused requests; the coordinator was told the codes alone."""
    from fedgraft.client.policy.reasons import last_reasons
    from fedgraft.client.site_config import load_site

    config, console = load_site(site), Console(as_json=as_json)
    reasons = last_reasons(Path(config.state), count)
    console.json({"site": config.name, "refusals": [asdict(one) for one in reasons]})
    if not reasons:
        console.text(f"{config.name}: no refusal is kept.")
        return
    console.text(f"{config.name} refused, the newest last:")
    for one in reasons:
        console.text(f"{one.at}  {one.stage}  {one.code}")
        for text in filter(None, (one.why, one.hint and f"hint: {one.hint}")):
            console.text("    " + "".join(sign if sign.isprintable() else "?" for sign in text))
