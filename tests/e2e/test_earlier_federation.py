"""What partners wrote before the wings is still opened: at a site and at the coordinator."""

import hashlib
import json
import shutil
import tomllib
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import command
from support.earlier import BEFORE, copy_of, copy_run, open_sites, recorded
from support.masked_talk import Node

from fedgraft.client.membership.credentials import load_membership, load_tls_key
from fedgraft.client.membership.identity import load_identity
from fedgraft.client.membership.roster import keep_roster, roster_fingerprint
from fedgraft.client.policy.approvals import Agreements, hash_plan
from fedgraft.client.policy.disclosure import estimate_disclosure
from fedgraft.client.policy.message_log import MessageLog, Occasion
from fedgraft.client.policy.policy_file import load_policy
from fedgraft.client.results.store import find_result
from fedgraft.client.secagg.stage_log import AgreedSums
from fedgraft.client.site_config import load_site
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.adapters.peft_folder import read_adapter
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.federation.audit_log import Audit, AuditHead, read, verify
from fedgraft.common.federation.certificates import begins, serial, site_of
from fedgraft.common.federation.federation_file import (
    Federation,
    dump_federation,
    load_federation,
)
from fedgraft.common.messages.codec import array_hash, encode
from fedgraft.common.messages.masked_terms import describe, floor_for, hash_work, training_terms
from fedgraft.common.messages.payloads import EvaluateRequest, KeysAsk, TrainRequest
from fedgraft.common.secagg import transcript
from fedgraft.common.secagg.errors import StageError
from fedgraft.common.secagg.keys import Identity
from fedgraft.common.secagg.statements import Advertisement, MaskedInput
from fedgraft.server.enrollment.provision import load_federation_spec
from fedgraft.server.enrollment.registry import Registry
from fedgraft.server.jobs.queue import Jobs, Submitted
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.protocol.masked import Masking, evaluate_masked
from fedgraft.server.protocol.unmasking_server import UnmaskingServer
from fedgraft.server.runs.checkpoints import load_newest
from fedgraft.server.runs.run_folder import Run

RUN = "20261130-150231-digits-a4c9"
SESSION = "c43375bb6d38d16347af9fc31cd62cba"
NAMES = ("site-00", "site-01", "site-02")
ALL = (0, 1, 2)  # their ids


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Coordinator:
    """The folder of the coordinator, and its run."""

    home: Path

    @cached_property
    def run(self) -> Run:
        return Run(self.home / "runs" / RUN)

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.run.job, open_workbench(self.run.job), self.run.session)

    def adapter(self, number: int) -> Any:
        """What the run came to after the round, float32 [exchanged]."""
        folder = self.home / f"only-{number}"
        folder.mkdir(exist_ok=True)
        (path,) = self.run.folder.glob(f"checkpoints/round-00000{number}.*")
        shutil.copy(path, folder)
        state, damaged = load_newest(folder, self.plan.exchanged.fingerprint)
        assert state is not None and state.round == number and not damaged
        return state.adapter

    def training(self, number: int) -> TrainRequest:
        """What sites were to train in a round after the first."""
        request, adapter = self.plan.request, self.adapter(number - 1)
        return TrainRequest(SESSION, number, 0, request.job, request.names, adapter)

    def evaluating(self, number: int) -> EvaluateRequest:
        """What sites were to evaluate after a round."""
        request, adapter = self.plan.request, self.adapter(number)
        return EvaluateRequest(SESSION, number, request.job, request.names, "validation", adapter)


@dataclass(frozen=True)
class Site:
    """The folder of the site ``site-00``."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "site.toml"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def audit(self) -> Path:
        return self.state / "audit.jsonl"

    def call(self, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
        """`fedgraft site WORDS --json`."""
        code, out, errors = command(capsys, "site", *words, "--site", str(self.file), "--json")
        assert code == 0, errors
        return dict(json.loads(out))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(copy_of("site", tmp_path))


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(copy_of("coordinator", tmp_path))


# --- the site


def test_the_site_finds_its_files(site: Site) -> None:
    config = load_site(site.file)
    assert (config.name, config.state) == ("site-00", str(site.state))
    assert (config.federation, config.policy) == (
        str(site.state / "roster.toml"),
        str(site.folder / "policy.toml"),
    )
    assert config.data.train == str(site.folder / "data" / "train.parquet")
    # Every line of the audit has the hash of the policy: it is read as it was.
    assert {line["policy"] for line in read(site.audit)} == {
        load_policy(site.folder / "policy.toml").hash
    }


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_site_is_the_member_that_it_was(site: Site) -> None:
    member = load_membership(site.state)
    assert (member.federation, member.site, member.sites) == ("trial", "site-00", NAMES)
    ca, pem = ((site.state / name).read_bytes() for name in ("ca.pem", "certificate.pem"))
    key = load_tls_key(site.state).public_key()
    assert site_of(pem, ca, key, begins(pem) + timedelta(hours=1)) == "site-00"
    roster = load_federation(site.state / "roster.toml")
    assert roster.key_of("site-00") == load_identity(site.state).public
    before = files_in(site.state)
    assert roster_fingerprint(roster) == hashlib.sha256(before["roster.toml"]).hexdigest()
    keep_roster(site.state, roster)  # the same as it has: nothing is written
    assert files_in(site.state) == before


def test_what_was_agreed_is_agreed_for_that_job_alone(site: Site, coordinator: Coordinator) -> None:
    request, job = coordinator.plan.request, coordinator.plan.job
    agreements = Agreements(site.state / "approvals")
    agreement = agreements.find(SESSION)
    assert agreement is not None and agreement.status == "agreed"
    assert agreement == agreements.newest() == agreements.named(SESSION[:6])
    plan = hash_plan(request.job, request.names)
    assert (agreement.job, agreement.plan) == (request.job, plan)
    leaving = estimate_disclosure(job.for_sites(), coordinator.plan.exchanged, len(NAMES))
    assert agreement.leaving == leaving.to_json()
    assert agreement.binds(plan, ask=False) and not agreement.binds(plan, ask=True)
    assert not agreement.binds(hash_plan(request.job, request.names[1:]), ask=False)
    agreements.decide(agreement, approve=True)
    approved = agreements.find(SESSION)
    assert approved == replace(agreement, status="approved")
    assert approved is not None and approved.binds(plan, ask=True)


def keys_ask(coordinator: Coordinator, request: TrainRequest, number: int) -> KeysAsk:
    """What begins the masked round ``number`` of the three sites."""
    job, federation = coordinator.run.job, load_federation(coordinator.home / "roster.toml")
    parameters = training_terms(job, SESSION, ALL, coordinator.plan.exchanged)
    work = describe(request)
    server = UnmaskingServer(
        roster=federation.roster,
        policy=floor_for(federation.policy, parameters, work.stage),
        parameters=parameters,
        round_number=number,
        model=hash_work(work),
    )
    return KeysAsk(SESSION, work, ALL, server.keys_request())


def test_a_stage_that_was_served_is_not_served_again(site: Site, coordinator: Coordinator) -> None:
    claims = site.state / SESSION / "claims"
    before = lines(claims)
    assert before[-1] == "4 UNMASK"
    node, request = Node({"site": str(site.file)}), coordinator.training(2)
    for number in (1, 4):
        assert node.code(keys_ask(coordinator, request, number), "keys") == "abstained"
    assert lines(claims) == before
    said = node.ask(keys_ask(coordinator, request, 5), "keys")
    assert isinstance(said, Advertisement)
    assert lines(claims) == [*before, "5 KEYS"]
    other = replace(request, names=request.names[1:])
    assert node.code(keys_ask(coordinator, other, 6), "keys") == "not-agreed"
    # All of that went on in the audit that was there.
    known = Registry(coordinator.home).sites()["site-00"]
    assert verify(site.audit, AuditHead(known.audit_lines, known.audit_head)) == 44 + 8


def sum_over(federation: Federation, *sites: int) -> bytes:
    """What a site notes of a sum over these sites."""
    return transcript.digest("sum", federation.roster.hash, transcript.encode(*sites))


def test_the_sums_that_were_agreed_to_are_known(site: Site, coordinator: Coordinator) -> None:
    federation = load_federation(site.state / "roster.toml")
    total = sum_over(federation, *ALL)
    asked = (coordinator.evaluating(1), coordinator.training(2), coordinator.evaluating(2))
    works = [hash_work(describe(request)) for request in asked]
    path = site.state / "sums"
    before = lines(path)
    pledge = AgreedSums(path)
    for work in works:
        assert f"{work.hex()} {total.hex()}" in before
        pledge(work, total)
        with pytest.raises(StageError):
            pledge(work, sum_over(federation, *ALL[:2]))
    assert lines(path) == before


def test_the_audit_is_whole_up_to_the_head_that_the_coordinator_knows(
    site: Site, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Registry(coordinator.home).sites()["site-00"]
    head = f"{known.audit_lines}:{known.audit_head}"
    told = site.call(capsys, "audit", "--verify", "--head", head)
    assert told == {"lines": 44, "head": head, "compared": True}
    text = site.audit.read_text()
    site.audit.write_text(text.replace('"round":2', '"round":1', 1))
    code, _, errors = command(capsys, "site", "audit", "--verify", "--site", str(site.file))
    assert code != 0 and "does not follow" in errors


def test_what_left_is_told_and_kept_until_there_is_newer(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = site.call(capsys, "audit", "--round", "2")["lines"]
    sent = [line for line in shown if line["decision"] == "sent" and line["tensors"]]
    assert [line["stage"] for line in sent] == ["train", "evaluate"]
    for line in sent:
        name = f"{line['stage']}-{line['sha256'][:16]}.npz"
        with np.load(site.state / "sent" / SESSION / "000002" / name) as kept:
            content = hashlib.sha256(kept["packed"].tobytes()).hexdigest()
        assert [one["sha256"] for one in line["tensors"]] == [content]
    reply = MaskedInput(0, np.zeros(9, np.uint8), b"signed")
    occasion = Occasion(SESSION, 3, "train", sent[0]["policy"])
    MessageLog(site.state, keep=1).sent(occasion, reply, encode(reply))
    assert [path.name for path in (site.state / "sent" / SESSION).iterdir()] == ["000003"]


def test_the_result_is_listed_shown_and_of_use(
    site: Site, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = site.call(capsys, "results")["results"]
    shown = site.call(capsys, "results", RUN)
    assert listed == [shown]
    assert (shown["run"], shown["received"]) == (RUN, "2026-11-30T15:02:57+00:00")
    assert shown["folder"] == str(site.state / "results" / RUN) and shown["models"] is None
    result, exchanged = find_result(site.state, RUN), coordinator.plan.exchanged
    assert (result.job, result.sites) == (coordinator.run.job.for_sites(), 3)
    past = [(line["round"], line["train_loss"]) for line in coordinator.run.history()]
    assert [(line.round, line.loss) for line in result.rounds] == past
    bench, final = open_workbench(result.job), coordinator.adapter(2)
    assert result.adapter == array_hash(final)
    assert result.fingerprint == bench.backbone.fingerprint
    kept = bench.layout.part(read_adapter(bench, result.folder / "adapter"), exchanged)
    np.testing.assert_array_equal(kept, final)


# --- sites whose keys are all here


@pytest.mark.usefixtures("old_split")
def test_no_site_adds_what_it_added_before_to_another_sum(tmp_path: Path) -> None:
    run = Run(copy_run("masked", tmp_path))
    plan = make_plan(run.job, open_workbench(run.job), run.session)
    state = run.latest(plan.exchanged)
    assert state is not None and state.round == 1
    names, places = plan.exchanged.names, sorted((run.folder / "sites").glob("*/sums"))
    request = EvaluateRequest(run.session, 1, plan.request.job, names, "validation", state.adapter)
    before = [lines(path) for path in places]
    assert all(hash_work(describe(request)).hex() in " ".join(sums) for sums in before)

    def ask_again() -> Any:
        with open_sites(run) as (transport, federation):
            assert federation is not None
            list(transport.invite(plan.request, 60, members=federation.ids))
            masking = Masking(federation, run.next_masked_round)
            return evaluate_masked(masking, run.job, transport, NAMES, request)

    path = run.folder / "sites" / "federation.toml"
    text, federation = path.read_text(), load_federation(path)
    more = {**federation.sites, "site-03": Identity.generate().public.hex()}
    bigger = Federation(secure_aggregation=federation.secure_aggregation, sites=more)
    path.write_text(dump_federation(bigger))
    other = ask_again()
    assert other.tally.examples == 0
    refused = {(drop.site, drop.reason) for drop in other.traffic.dropped}
    assert refused >= {(name, "abstained") for name in NAMES}
    path.write_text(text)
    again = ask_again()  # of the same sites: the same sum
    measured = run.job.measures.figures(again.tally) | {"examples": again.tally.examples}
    assert measured == pytest.approx(run.history()[0]["validation"], abs=1e-2)
    assert [lines(path) for path in places] == before


# --- the coordinator


def test_the_registry_is_read_and_is_the_same_again(coordinator: Coordinator, site: Site) -> None:
    registry = Registry(coordinator.home)
    sites = registry.sites()
    assert [(name, one.state) for name, one in sites.items()] == [(n, "joined") for n in NAMES]
    assert registry.members().keys() == set(NAMES)
    one = sites["site-00"]
    assert one.identity == load_identity(site.state).public.hex()
    pem = (site.state / "certificate.pem").read_bytes()
    assert [each.serial for each in one.certificates] == [serial(pem)]
    assert (one.audit_run, one.audit_round, one.audit_lost) == (SESSION, 2, 0)
    plan = load_federation_spec(coordinator.home / "federation.toml")
    assert sorted(plan.federation.sites) == list(NAMES)
    files = ("sites.json", "roster.toml", "crl.pem", "floor.json")
    before = {name: (coordinator.home / name).read_bytes() for name in files}
    (coordinator.home / "roster.toml").unlink()
    with registry.lock():
        registry.write(sites)
    for name, content in before.items():
        assert (coordinator.home / name).read_bytes() == content, name
    assert before["roster.toml"] == (site.state / "roster.toml").read_bytes()


def test_the_queue_and_the_audit_of_the_coordinator_are_read(coordinator: Coordinator) -> None:
    jobs = Jobs(coordinator.home / "jobs")
    assert jobs.all() == [Submitted(RUN, "finished", "", 1)]
    assert jobs.next() is None
    assert parse_job(tomllib.loads(jobs.text(RUN)), where=RUN) == coordinator.run.job
    jobs.set(RUN, "waiting")
    assert jobs.next() == Submitted(RUN, "waiting", "", 1)
    audit = coordinator.home / "audit.jsonl"
    assert verify(audit) == 18
    joined = [line["site"] for line in read(audit) if line["event"] == "enrolled"]
    assert joined == list(NAMES)
    Audit(audit).append({"event": "started"})
    assert verify(audit) == 19


def test_the_run_of_the_coordinator_is_read_and_given_away(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = coordinator.run
    place = f"coordinator/runs/{RUN}"
    assert run.session == SESSION
    assert run.summary() == recorded(f"{place}/summary.json")
    assert run.environment() == recorded(f"{place}/environment.json")
    assert [line["masked"]["survivors"] for line in run.history()] == [3, 3]
    told = [event["event"] for event in run.events()]
    assert told == ["round", "round", "handed-over", "finished"]
    assert run.next_masked_round() == 5
    out = tmp_path / "given"
    code, _, errors = command(capsys, "export", str(run.folder), "--out", str(out))
    assert code == 0, errors
    for name in ("adapter_model.safetensors", "fedgraft.json"):
        assert (out / name).read_bytes() == (BEFORE / place / "adapter" / name).read_bytes()
    code, _, errors = command(capsys, "report", str(run.folder))
    assert code == 0, errors
    assert "site-02" in (run.folder / "report.html").read_text(encoding="utf-8")
