"""From a site's files to its agent, and what that sees to once a minute."""

import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.clinic import Authority, Site

from fedgraft.client.agent import startup as start
from fedgraft.client.agent.startup import EVERY, make_agent
from fedgraft.client.membership.identity import load_identity
from fedgraft.common.errors import FedgraftError, InputError, JobError
from fedgraft.common.secagg.keys import verify


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("FEDGRAFT_BACKBONES", "before")  # put back afterwards
    monkeypatch.setattr(start, "AuditReporter", Helper)
    monkeypatch.setattr(start, "IdleEvaluation", Helper)
    return Site(tmp_path / "site", Authority(), "coordinator.example:8443")


class Helper:
    """Stands in for what reports heads and for what measures results."""

    def __init__(self, *_: object) -> None:
        self.said: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.said.append(name)


class World:
    """What an agent's chores ask, and the time; ``fault`` is raised instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.due, self.fault = 1000.0, False, ""
        self.done: list[str] = []
        monkeypatch.setattr("fedgraft.client.agent.startup.time.monotonic", lambda: self.now)
        monkeypatch.setattr(start, "renewal_due", self._due)
        monkeypatch.setattr(start, "renew", lambda member, state: self._do("renew"))
        monkeypatch.setattr(start, "refresh_roster", lambda state: self._do("roster"))

    def _due(self, state: Path, now: datetime) -> bool:
        assert abs((datetime.now(UTC) - now).total_seconds()) < 60
        return self.due

    def _do(self, what: str) -> None:
        self.done.append(what)
        if self.fault:
            raise FedgraftError(self.fault, hint="mend it")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_the_agent_is_what_the_files_say(site: Site) -> None:
    agent = make_agent(site.file)
    assert (agent.site, agent.endpoint) == ("a", "coordinator.example:8443")
    assert agent.node_config == {"site": str(site.file.resolve())}
    assert agent.key.private_numbers() == site.key.private_numbers()
    verify(load_identity(site.state).public, agent.sign(b"said"), b"said")
    context: Any = agent.tls()
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert os.environ["FEDGRAFT_BACKBONES"] == str(site.state / "backbones")


def test_tls_is_made_anew_with_the_certificate_of_then(site: Site) -> None:
    agent = make_agent(site.file)
    agent.tls()
    (site.state / "certificate.pem").write_text("none")
    with pytest.raises(Exception, match=r"(?i)pem|ssl"):
        agent.tls()


def test_a_relative_path_is_kept_as_a_whole_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.folder)
    assert make_agent(Path("site.toml")).node_config == {"site": str(site.file.resolve())}


def test_another_name_than_the_kits_is_refused(site: Site) -> None:
    site.file.write_text(site.file.read_text().replace('name = "a"', 'name = "z"'))
    with pytest.raises(InputError, match="says z, and the membership is of a") as error:
        make_agent(site.file)
    assert "as its kit does" in error.value.hint


@pytest.mark.parametrize("name", ["membership.json", "tls.key", "identity.pem"])
def test_what_is_missing_is_named_before_anything_starts(site: Site, name: str) -> None:
    (site.state / name).unlink()
    with pytest.raises(InputError) as error:
        make_agent(site.file)
    assert error.value.hint


def test_a_mistake_in_the_policy_is_told_before_anything_starts(site: Site) -> None:
    policy = site.folder / "policy.toml"
    policy.write_text(policy.read_text() + "\n[limits]\nmax_round = 50\n")
    with pytest.raises(JobError, match="max_round"):
        make_agent(site.file)


def test_once_a_minute_the_roster_is_refreshed(site: Site, world: World) -> None:
    idle = make_agent(site.file).chores.idle
    assert not idle()  # at once: sites may have joined while this one was away
    assert world.done == ["roster"]
    world.now += EVERY - 1
    idle()
    assert world.done == ["roster"]
    world.now += 1
    idle()
    assert world.done == ["roster", "roster"]


def test_a_certificate_whose_time_has_come_is_renewed(site: Site, world: World) -> None:
    world.due = True
    idle = make_agent(site.file).chores.idle
    assert idle()
    assert world.done == ["roster", "renew"]
    world.due, world.now = False, world.now + EVERY
    assert not idle()
    assert world.done == ["roster", "renew", "roster"]


def test_where_certificates_are_short_the_roster_is_refreshed_too(site: Site, world: World) -> None:
    """A certificate that is due each minute kept new sites out of the roster, for good."""
    world.due = True
    idle = make_agent(site.file).chores.idle
    for _ in range(3):
        assert idle()
        world.now += EVERY
    assert world.done == ["roster", "renew"] * 3


@pytest.mark.parametrize("due", [False, True])
def test_what_fails_is_told_and_tried_again(
    site: Site, world: World, caplog: pytest.LogCaptureFixture, due: bool
) -> None:
    caplog.set_level(logging.WARNING)
    world.due, world.fault = due, "the coordinator does not answer"
    idle = make_agent(site.file).chores.idle
    for _ in range(2):
        assert not idle()
        world.now += EVERY
    assert world.done == (["roster", "renew"] if due else ["roster"]) * 2
    told = caplog.text.count("the coordinator does not answer; mend it")
    assert told == len(world.done)


def test_the_federations_work_comes_before_the_results(site: Site, world: World) -> None:
    chores: Any = make_agent(site.file).chores
    reporter, results = chores._reporter, chores._results
    assert reporter.said == ["wake"]  # what was not reported before it was killed
    chores.came()
    chores.answered()
    chores.idle()
    chores.close()
    assert results.said == ["interrupt", "step", "interrupt"]
    assert reporter.said == ["wake", "wake", "close"]
