"""The verbs of provisioning: write kits for new sites, renew a kit, and revoke a site."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.server.cli.options import HERE, HomeFolder, Json

__all__ = ["kits", "renew", "revoke", "sites"]

Kits = Annotated[Path, typer.Option("-o", "--out", help="Folder for the kits.")]
SiteName = Annotated[str, typer.Argument(help="Name of a site.")]
KITS = Path("kits")


def kits(
    federation: Annotated[Path, typer.Argument(help="federation.toml: name, endpoint, sites.")],
    out: Kits = KITS,
    home: HomeFolder = HERE,
    as_json: Json = False,
) -> None:
    """Found a federation, or add the sites that are new in its file; one kit for each."""
    from fedgraft.server.enrollment.provision import found

    console = Console(as_json=as_json)
    made = found(federation, home, out)
    console.json({"fingerprint": made.fingerprint, "kits": [str(path) for path in made.kits]})
    for name in made.left:
        console.note(f"{federation} names {name} no more: fedgraft provision revoke {name}")
    rows = [[path.name.removesuffix(".kit"), str(path)] for path in made.kits]
    console.table("Kits" if rows else "No new site", ["site", "file"], rows)
    console.text(
        f"fingerprint: {made.fingerprint}\n"
        "Send each site its kit; tell it the fingerprint by another way.\n"
        f"next: fedgraft coordinator run --home {home}"
    )


def renew(site: SiteName, out: Kits = KITS, home: HomeFolder = HERE) -> None:
    """Write a site's kit again, with another token; the old kit and its certificates are void."""
    from fedgraft.server.enrollment.provision import renew_kit

    Console().text(f"wrote {renew_kit(home, site, out)}")


def revoke(site: SiteName, home: HomeFolder = HERE) -> None:
    """Shut a site out: within a minute where the coordinator runs, open sessions included."""
    from fedgraft.server.enrollment.provision import revoke as shut_out

    shut_out(home, site)
    Console().text(f"{site} is shut out; to let it in again: fedgraft provision renew {site}")


def sites(home: HomeFolder = HERE, as_json: Json = False) -> None:
    """List the sites and what became of their kits."""
    from fedgraft.server.enrollment.registry import Registry

    console = Console(as_json=as_json)
    found = Registry(home).sites()
    lines = [
        {
            "site": name,
            "state": site.state,
            "joined": site.joined,
            "kit_expires": site.kit_expires if site.state == "invited" else "",
            "certificate_expires": max((one.expires for one in site.certificates), default=""),
        }
        for name, site in found.items()
    ]
    console.json({"sites": lines})
    rows = [[text[:16].replace("T", " ") or "-" for text in line.values()] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        row[0] = line["site"]
    columns = ["site", "state", "joined", "kit until", "certificate until"]
    console.table("Sites", columns, rows)
