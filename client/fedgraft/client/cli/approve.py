"""``fedgraft site approve``: a person decides on a job that the policy allows but asks about."""

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

if TYPE_CHECKING:
    from fedgraft.client.policy.approvals import Agreement

__all__ = ["approve"]


def approve(
    run: Annotated[str, typer.Argument(help="The run's id, or its first characters.")] = "",
    site: Annotated[Path, typer.Option(help="The site's configuration.")] = Path("site.toml"),
    deny: Annotated[bool, typer.Option("--deny", help="Refuse the job instead.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the jobs that wait for approval, or approve one."""
    from fedgraft.client.membership.state_files import APPROVALS
    from fedgraft.client.policy.approvals import Agreements
    from fedgraft.client.site_config import load_site

    config, console = load_site(site), Console(as_json=as_json)
    if config.policy is None:
        raise InputError(f"{site} names no policy", hint='policy = "policy.toml"')
    agreements = Agreements(Path(config.state) / APPROVALS)
    if not run:
        _list(console, agreements.pending())
        return
    agreement = agreements.named(run)
    for line in _in_words(agreement):  # the coordinator chose some of the words
        console.note("".join(sign if sign.isprintable() else "?" for sign in line))
    verb = "deny" if deny else "approve"
    if not yes and not (sys.stdin.isatty() and typer.confirm(f"{verb} it?", err=True)):
        raise InputError("nothing was decided", hint="answer y, or add --yes")
    decision = "denied" if deny else "approved"
    _record(Path(config.state), Path(config.policy), agreement, decision)
    agreements.decide(agreement, approve=not deny)
    console.json({"run": agreement.session, "status": decision})
    console.text(f"{decision} {agreement.session}")


def _record(state: Path, policy: Path, agreement: "Agreement", decision: str) -> None:
    """Record the decision in the audit first: without a record, nothing is decided."""
    from fedgraft.client.policy.message_log import MessageLog, Occasion
    from fedgraft.client.policy.policy_file import load_policy

    rules = load_policy(policy)
    occasion = Occasion(agreement.session, 0, "approve", rules.hash)
    MessageLog(state, keep=rules.limits.keep_sent).decided(occasion, decision)


def _list(console: Console, pending: "list[Agreement]") -> None:
    console.json({"pending": [_facts(each) for each in pending]})
    if not pending:
        console.text("no job waits for approval")
        return
    for facts in map(_facts, pending):
        console.text(f"{facts['run']}  {facts['job']}, asked for at {facts['asked']}")
        console.text(f"  would leave: {facts['leaving']}")
    console.note("next: fedgraft site approve RUN, or with --deny")


def _facts(agreement: "Agreement") -> dict[str, Any]:
    from fedgraft.client.policy.disclosure import Disclosure
    from fedgraft.common.config.job import Job

    return {
        "run": agreement.session,
        "asked": datetime.fromtimestamp(agreement.asked).isoformat(" ", "seconds"),
        "job": Job.model_validate_json(agreement.job).job.name,
        "leaving": Disclosure(**agreement.leaving).in_words(),
        "status": agreement.status,
    }


def _in_words(agreement: "Agreement") -> list[str]:
    from fedgraft.common.config.job import Job

    job, facts = Job.model_validate_json(agreement.job), _facts(agreement)
    rank = f" of rank {rank}" if (rank := job.method.low_rank) else ""
    labels = f" into {', '.join(job.job.labels)}" if job.job.labels else ""
    return [
        f"Run {agreement.session}, asked for at {facts['asked']}, now {agreement.status}.",
        f"Job {job.job.name}: {job.job.task}{labels}.",
        f"Backbone {job.backbone.source}; trains a {job.method.kind} adapter{rank}.",
        f"{job.training.epochs} epochs a round over this site's training data.",
        f"Would leave: {facts['leaving']}.",
        f"Tensors: {', '.join(agreement.leaving['tensors'])}.",
    ]
