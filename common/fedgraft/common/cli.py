"""The ``fedgraft`` command: a table of verbs, each loaded only when called."""

import sys
import traceback
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click
import typer.core
import typer.main

from fedgraft.common.console import print_error
from fedgraft.common.errors import FedgraftError, InputError

__all__ = ["VERBS", "main"]

VERBOSE = ("-v", "--verbose")  # before or after the verb

# verb -> its places, and one line of help. A verb can have two places; the first whose room is
# installed is used. A verb without an installed place is not offered.
VERBS: dict[str, tuple[str, ...]] = {
    "init": ("fedgraft.server.cli.jobs:init", "Write a commented job file to start from."),
    "check": (
        "fedgraft.simulations.cli.check:check",  # with the sites of a simulation
        "fedgraft.server.cli.jobs:check",
        "Validate a job and its data; say what it will cost.",
    ),
    "simulate": (
        "fedgraft.simulations.cli.simulate:simulate",
        "Run a whole federation on this machine.",
    ),
    "sweep": ("fedgraft.simulations.cli.sweep:sweep", "Simulate every setting of a grid; compare."),
    "select": ("fedgraft.simulations.cli.select:select", "Rank backbones before any training."),
    "runs": ("fedgraft.server.cli.jobs:runs", "List runs and what they came to."),
    "report": ("fedgraft.server.cli.jobs:report", "Write a run's report.html again."),
    "explain": ("fedgraft.server.cli.explain:explain", "What of an input a run's model looked at."),
    "export": ("fedgraft.server.cli.jobs:export", "Write a run's adapter or merged model."),
    "provision kits": (
        "fedgraft.server.cli.provision:kits",
        "Found a federation, or add sites: one kit for each (`provision FILE` is short for it).",
    ),
    "provision renew": ("fedgraft.server.cli.provision:renew", "Write a site's kit again."),
    "provision revoke": ("fedgraft.server.cli.provision:revoke", "Shut a site out."),
    "provision list": ("fedgraft.server.cli.provision:sites", "List the sites and their kits."),
    "coordinator run": ("fedgraft.server.cli.coordinator:run", "Run the coordinator."),
    "coordinator status": ("fedgraft.server.cli.coordinator:status", "Sites, runs, processes."),
    "coordinator stop": ("fedgraft.server.cli.coordinator:stop", "Stop a run, or all of it."),
    "submit": ("fedgraft.server.cli.coordinator:submit", "Give the coordinator a job."),
    "site join": ("fedgraft.client.cli.site:join", "Join a federation with a kit."),
    "site doctor": ("fedgraft.client.cli.doctor:doctor", "Try what taking part needs."),
    "site run": ("fedgraft.client.cli.site:run", "Take part until stopped."),
    "site status": ("fedgraft.client.cli.status:status", "Why this site refused what it did."),
    "site admit": ("fedgraft.client.cli.site:admit", "Agree to a site that came later."),
    "site approve": ("fedgraft.client.cli.approve:approve", "Approve jobs that wait for you."),
    "site audit": ("fedgraft.client.cli.audit:audit", "What came and went; verify it; export it."),
    "site results": ("fedgraft.client.cli.results:results", "What runs came to for this site."),
    "fetch": ("fedgraft.client.cli.fetch:fetch", "Import a local backbone at a site."),
}
GROUPS = {
    "provision": "Found a federation; kits for its sites.",
    "coordinator": "Run the coordinator of a federation.",
    "site": "Take part in a federation.",
}
SHORT = {"provision": "kits"}  # `provision FILE` needs no verb


class LazyGroup(click.Group):
    """A group that imports a verb's module on use, so that ``--help`` does not import torch.

    ``within`` is the verb before the verbs of this group, if there is one.
    """

    def __init__(self, *arguments: Any, within: str = "", **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.within = within

    def _verbs(self) -> dict[str, str]:
        """Return the verbs of this group in the installed rooms, each with its line of help."""
        found: dict[str, str] = {}
        for verb, (*places, text) in VERBS.items():
            first, _, second = verb.partition(" ")
            if not any(map(_room_is_there, places)):
                continue
            if not self.within:
                found.setdefault(first, GROUPS[first] if second else text)
            elif first == self.within:
                found[second] = text
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs of the installed rooms, in the order of the table."""
        return list(self._verbs())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, but insert the short form's verb, also before options."""
        short = SHORT.get(self.within)
        if short and args and args[0] not in (*self._verbs(), "--help"):
            args = [short, *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the command of one verb, or explain that this install does not have it."""
        if not self.within and name in GROUPS:
            if name not in self._verbs():
                raise click.ClickException(f"`{name}` is not part of this install")
            return LazyGroup(name, within=name, help=GROUPS[name], no_args_is_help=True)
        verb = f"{self.within} {name}".strip()
        if verb not in VERBS:
            return None
        *places, _ = VERBS[verb]
        place = next(filter(_room_is_there, places), "")
        if not place:
            raise click.ClickException(f"`{verb}` is not part of this install")
        module, _, function = place.partition(":")
        found = getattr(import_module(module), function)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(found)
        return typer.main.get_command(app)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._verbs().items()))


def _room_is_there(place: str) -> bool:
    """Return whether the room of ``fedgraft.room.wing.module:function`` is installed."""
    room = place.partition(":")[0].split(".")[:2]
    return len(room) < 2 or find_spec(".".join(room)) is not None


@click.group(cls=LazyGroup)
@click.option("-v", "--verbose", is_flag=True, help="Show a traceback when something fails.")
@click.version_option(package_name="fedgraft", prog_name="fedgraft")
def command(verbose: bool) -> None:
    """Federated transfer learning: adapters travel, data stays."""


def main() -> None:
    """Run the command; print a message for an error, and exit with its code."""
    typer.core.HAS_RICH = False  # it would escape "[default: ...]" for rich where it prints plain
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    arguments = [argument for argument in sys.argv[1:] if argument not in VERBOSE]
    try:
        code = command(arguments, standalone_mode=False)
    except BaseException as error:
        code = _explain(error)
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exception(error)
        sys.exit(code)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: BaseException) -> int:
    """Print the problem and the next step, and return the exit code."""
    if isinstance(error, FedgraftError):
        print_error(error)
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return 2
    if isinstance(error, click.UsageError):
        verb = error.ctx.command_path if error.ctx else "fedgraft"
        print_error(InputError(error.format_message(), hint=f"{verb} --help"))
        return 2
    if isinstance(error, click.ClickException):
        print_error(InputError(error.format_message()))
        return 2
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        sys.stderr.write("interrupted\n")
        return 130
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, ModuleNotFoundError):
        missing = f"the package {error.name} is not installed"
        print_error(FedgraftError(missing, hint="pip install fedgraft again, into this Python"))
    elif not isinstance(error, BrokenPipeError):
        hint = "this is a fault in fedgraft: run it again with -v and report what that shows"
        print_error(FedgraftError(f"unexpected {type(error).__name__}", hint=hint))
    return 1
