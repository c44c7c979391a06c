"""A site's commands for its membership: join a federation, take part in it."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

__all__ = ["admit", "join", "run"]

SiteFile = Annotated[Path, typer.Option("--site", help="The site's own configuration.")]
HERE = Path("site.toml")
TEMPLATE = """\
# This site's own configuration. Nothing in it ever leaves the site.
name = "{name}"
state = "state"                     # keys, certificate, audit: for this user alone
federation = "state/roster.toml"
policy = "policy.toml"
device = "auto"                     # auto | cuda | mps | cpu

[data]
train = "data/train.jsonl"          # a file, a folder or a glob: fill in where yours is
# test = "data/test.jsonl"
# columns = {{ text = "question" }}   # a column of the job: what it is called here
"""


def join(
    kit: Annotated[Path, typer.Argument(help="The .kit file from the coordinator.")],
    fingerprint: Annotated[
        str, typer.Option(help="What the coordinator told you by another way than the kit.")
    ],
    site: SiteFile = HERE,
) -> None:
    """Join a federation: make keys here, have them certified, write the files to fill in."""
    from datetime import UTC, datetime

    from fedgraft.client.membership.join import join as enrol
    from fedgraft.client.site_config import load_site
    from fedgraft.common.federation.kit import open_kit
    from fedgraft.common.files import write_text

    now = datetime.now(UTC)
    opened = open_kit(kit, fingerprint, now)
    state, policy = site.parent / "state", site.parent / "policy.toml"
    if site.exists():
        config = load_site(site)
        state, policy = Path(config.state), Path(config.policy or policy)
        if config.name != opened.site:
            raise InputError(
                f"{site} is of {config.name}, and the kit is for {opened.site}",
                hint="name another --site, or take the other kit",
            )
    joined = enrol(opened, state, now)
    files = {site: TEMPLATE.format(name=opened.site), policy: opened.policy}
    written = [path for path in files if not path.exists()]
    for path in written:
        write_text(path, files[path])
    console = Console()
    console.text(f"{opened.site} has joined {opened.federation}")
    for path in written:
        console.text(f"wrote {path}: read it, and fill in what is yours")
    for name in joined.strangers:
        console.note(f"the kit does not name {name}; if you agree: fedgraft site admit {name}")
    console.text(f"next: fedgraft site doctor --site {site}")


def admit(
    name: Annotated[
        str, typer.Argument(help="The name of the other site; your kit need not name it.")
    ],
    key: Annotated[
        str, typer.Option(help="Its public key, as that site told you by another way.")
    ] = "",
    site: SiteFile = HERE,
) -> None:
    """Agree to a site that joined later, or to a new key of a site that made its keys again."""
    from fedgraft.client.membership.roster import admit as agree
    from fedgraft.client.site_config import load_site

    agree(Path(load_site(site).state), name, key)
    Console().text(
        f"{name} may take part"
        + (" with that key and no other" if key else "")
        + "\nCompare the roster with the other sites again: fedgraft site doctor"
    )


def run(site: SiteFile = HERE) -> None:
    """Take part until stopped: ask the coordinator for work, do it, record it."""
    import logging
    import signal

    from fedgraft.client.agent.startup import make_agent

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    agent = make_agent(site)

    def stop(*_: object) -> None:
        agent.stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    agent.run()
