"""A site's verbs that concern its membership: join a federation, take part in it."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

__all__ = ["join", "run"]

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
    """Join a federation: make keys here, have them certified, write what to fill in."""
    from datetime import UTC, datetime

    from fedgraft.client.membership import join as enrol
    from fedgraft.client.site import load_site
    from fedgraft.common.files import write_text
    from fedgraft.common.kit import open_kit

    opened = open_kit(kit, fingerprint, datetime.now(UTC))
    state = Path(load_site(site).state) if site.exists() else site.parent / "state"
    if (state / "membership.json").exists():
        raise InputError("this site has joined already", hint=f"to join again, move {state} away")
    member = enrol(opened, state)
    files = {
        site: TEMPLATE.format(name=member.site),
        site.parent / "policy.toml": opened.policy,
    }
    written = [path for path in files if not path.exists()]
    for path in written:
        write_text(path, files[path])
    console = Console()
    console.text(f"{member.site} has joined {member.federation}")
    for path in written:
        console.text(f"wrote {path}: read it, and fill in what is yours")
    console.text(f"next: fedgraft site doctor --site {site}")


def run(site: SiteFile = HERE) -> None:
    """Take part until stopped: ask the coordinator for work, do it, record it."""
    import logging
    import signal

    from fedgraft.client.start import make_agent

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    agent = make_agent(site)

    def stop(*_: object) -> None:
        agent.stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    agent.run()
