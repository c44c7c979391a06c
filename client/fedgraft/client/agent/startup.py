"""Make a site's agent from its files: its identity, its coordinator, its chores."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fedgraft.client.agent.idle_evaluation import IdleEvaluation
from fedgraft.client.agent.process import Agent, Chores, make_tls
from fedgraft.client.membership.credentials import (
    Membership,
    load_membership,
    load_tls_key,
    renew,
    renewal_due,
)
from fedgraft.client.membership.identity import load_identity
from fedgraft.client.membership.roster import refresh_roster
from fedgraft.client.membership.state_files import BACKBONES, CA, CERTIFICATE, TLS_KEY
from fedgraft.client.policy.audit_reporter import AuditReporter
from fedgraft.client.policy.policy_file import load_policy
from fedgraft.client.site_config import load_site
from fedgraft.common.errors import FedgraftError, InputError

__all__ = ["make_agent"]

log = logging.getLogger("fedgraft.client")

EVERY = 60.0  # seconds between two checks of the certificate and the roster


def make_agent(path: Path) -> Agent:
    """Return the agent of the site whose ``site.toml`` is at ``path``.

    Raises:
        InputError: the site has not joined, or one of its files is wrong.
    """
    config = load_site(path)
    state = Path(config.state)
    member = load_membership(state)
    if member.site != config.name:
        raise InputError(
            f"{path} says {config.name}, and the membership is of {member.site}",
            hint="name the site as its kit does",
        )
    if config.policy is not None:
        load_policy(Path(config.policy))  # or a mistake in it would refuse every message
    os.environ["FEDGRAFT_BACKBONES"] = str(state / BACKBONES)
    return Agent(
        site=member.site,
        endpoint=member.endpoint,
        key=load_tls_key(state),
        sign=load_identity(state).sign,
        node_config={"site": str(path.resolve())},
        tls=partial(make_tls, state / CA, state / CERTIFICATE, state / TLS_KEY),
        chores=_MemberChores(member, state, path.resolve()),
    )


class _MemberChores(Chores):
    """The chores of a member: certificate and roster once a minute, audit and results."""

    def __init__(self, member: Membership, state: Path, site: Path) -> None:
        self.member, self.state = member, state
        self._last = time.monotonic() - EVERY
        self._reporter = AuditReporter(member, state)
        self._results = IdleEvaluation(site, state)
        self._reporter.wake()  # report the lines that a killed process left unreported

    def came(self) -> None:
        """Stop measuring results, because the federation's work comes first."""
        self._results.interrupt()

    def answered(self) -> None:
        """Have the new lines of the audit reported."""
        self._reporter.wake()

    def idle(self) -> bool:
        """Measure results; check certificate and roster once a minute; return whether renewed."""
        self._results.step()
        return self._upkeep()

    def close(self) -> None:
        """Stop measuring, and report the audit's lines that are not reported yet."""
        self._results.interrupt()
        self._reporter.close()

    def _upkeep(self) -> bool:
        """Take keys of new sites, and renew the certificate, when due; return whether renewed."""
        if time.monotonic() - self._last < EVERY:
            return False
        self._last = time.monotonic()
        with _going_on("roster"):  # the one must not keep the other from being done
            refresh_roster(self.state)
        with _going_on("certificate"):
            if renewal_due(self.state, datetime.now(UTC)):
                renew(self.member, self.state)
                log.info("the certificate was renewed")
                return True
        return False


@contextmanager
def _going_on(what: str) -> Iterator[None]:
    """Log what goes wrong with ``what``: the site goes on, and it is tried again in a minute."""
    try:
        yield
    except FedgraftError as error:
        log.warning("%s; %s", error, error.hint)
    except OSError as error:  # a full disk must not end the site
        log.warning("the %s could not be checked or saved: %s", what, error.strerror)
