"""What sites refuse, as real processes: jobs outside their policy, backbones that are not right.

Each refusal has its code at the coordinator and a line in the site's audit. Starting a run takes
seconds, so every run is refused by three sites, each for a reason of its own.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import grpc
import pytest
from e2e.partners import NGINX, Partners
from flwr.app import ConfigRecord
from support.federations import digits_job, write_digits
from support.models import flip

from fedgraft.common.backbones.blob_store import BlobStore, Manifest, make_manifest
from fedgraft.common.backbones.load import find_backbone
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job
from fedgraft.common.federation.audit_log import verify
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.server.runs.run_folder import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

MASKED = ("privacy.secure_aggregation.enabled=true",)
Refusals = dict[str, tuple[str, set[str]]]  # by a rule's name


@dataclass(frozen=True, eq=False)
class Rule:
    """A key of the policy that a job of two rounds with LoRA of rank 8 does not keep to."""

    section: str
    key: str
    value: Any
    code: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}{'-masked' * bool(self.overrides)}"


def elsewhen() -> str:
    """Hours that begin in two hours and last for one."""
    begin = datetime.now() + timedelta(hours=2)
    return f"{begin:%H:%M}-{begin + timedelta(hours=1):%H:%M}"


RULES = (
    Rule("model", "allowed_backbones", {"glyph-vit": f"sha256:{'0' * 64}"}, "policy-backbone"),
    Rule("model", "allowed_methods", ["head"], "policy-method"),
    Rule("model", "max_rank", 2, "policy-rank"),
    Rule("privacy", "secure_aggregation", "required", "policy-secure-aggregation"),
    Rule("privacy", "min_cohort", 4, "policy-cohort"),
    Rule("privacy", "min_examples", 10_000, "policy-examples"),
    Rule("privacy", "min_local_steps", 1_000, "policy-steps"),
    Rule("limits", "max_rounds", 1, "policy-rounds"),
    Rule("limits", "max_bytes_out_per_round", "1kB", "policy-bytes"),
    Rule("limits", "hours", elsewhen(), "policy-hours"),
    Rule("metrics", "allowed", ["accuracy"], "policy-metrics"),
    Rule("approval", "mode", "ask", "approval-pending"),
    # No job has differential privacy: a bound on it cannot be kept, so such a policy is none.
    Rule("privacy", "max_epsilon_total", 1.0, "JobError"),
    Rule("privacy", "delta", 1e-9, "JobError"),
    Rule("privacy", "max_colluding", 2, "policy-colluding", MASKED),
    Rule("privacy", "min_cohort", 4, "policy-cohort", MASKED),
    Rule("privacy", "min_examples", 10_000, "not-eligible", MASKED),
)


def small_job(folder: Path, *overrides: str) -> Job:
    options = ("rounds.min_sites=3", "rounds.count=2", "rounds.deadline='60s'", *overrides)
    return digits_job(*write_digits(folder / "digits", 60, 30), *options)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("r")  # short: it holds sockets
    with Partners(folder, small_job(folder)) as running:
        running.join_all()
        running.start_sites()
        yield running


def audit(partners: Partners, site: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in partners.read(f"{site}/state/audit.jsonl").splitlines()]


def session_of(partners: Partners, run: str) -> str:
    """What sites know a run by, once it has begun."""
    path = partners.home / "runs" / run / "run.json"
    return str(json.loads(path.read_text())["session"]) if path.exists() else ""


def refused(partners: Partners, job: Job) -> tuple[dict[str, str], set[str]]:
    """What each site's audit says first of a job, and the codes at the coordinator."""
    run = partners.submit(job)

    def codes() -> dict[str, str]:
        session = session_of(partners, run)
        return {
            site: line["code"] or line["decision"]
            for site in partners.data
            for line in reversed(audit(partners, site))
            if line["direction"] == "out" and line["run"] == session
        }

    def told() -> set[str]:
        events = Run(partners.home / "runs" / run).events() if session_of(partners, run) else []
        warned = [event for event in events if event["event"] == "warning"]
        return {site["reason"] for event in warned for site in event["sites"]}

    partners.until(lambda: len(codes()) == len(partners.data) and told())
    partners.call("coordinator", "stop", run, "--home", str(partners.home))
    assert partners.rounds(run) == []
    return codes(), told()


@pytest.fixture(scope="module")
def refusals(partners: Partners) -> Refusals:
    """What became of each rule: the code at the site, and those at the coordinator."""
    found: Refusals = {}
    sites = sorted(partners.data)
    for overrides in ((), MASKED):
        rules = [rule for rule in RULES if rule.overrides == overrides]
        for first in range(0, len(rules), len(sites)):
            # Where rules are fewer than sites, a site refuses for the reason it had before.
            chosen = dict(zip(rules[first : first + len(sites)], sites, strict=False))
            for rule, site in chosen.items():
                partners.write_policy(site, **{rule.section: {rule.key: rule.value}})
            codes, told = refused(partners, small_job(partners.folder, *overrides))
            found |= {rule.name: (codes[site], told) for rule, site in chosen.items()}
    return found


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_a_job_outside_the_policy(refusals: Refusals, rule: Rule) -> None:
    code, told = refusals[rule.name]
    assert code == rule.code
    assert rule.code in told


def test_audits_of_what_was_refused_are_whole(partners: Partners, refusals: Refusals) -> None:
    for site in partners.data:
        assert verify(partners.folder / site / "state" / "audit.jsonl") >= len(refusals) / 3


def test_what_a_person_allows_leaves_as_the_policy_says(partners: Partners) -> None:
    """The keys that refuse nothing: what is kept here, and how round a number in clear is."""
    partners.write_policy("site-00", approval={"mode": "ask"})
    partners.write_policy("site-01", limits={"keep_sent": 0})
    partners.write_policy("site-02", limits={"keep_sent": 1}, metrics={"round_to": 0})
    run = partners.submit(small_job(partners.folder))
    partners.until(lambda: session_of(partners, run))
    session = session_of(partners, run)

    def decisions() -> list[str]:
        lines = audit(partners, "site-00")
        return [line.get("code") or line["decision"] for line in lines if line["run"] == session]

    partners.until(lambda: "approval-pending" in decisions())
    site = ("--site", str(partners.folder / "site-00" / "site.toml"))
    partners.call("site", "approve", session, *site, "--yes")
    partners.until(lambda: partners.state(run) == "finished")
    told = decisions()
    assert told.index("approval-pending") < told.index("approved") < told.index("sent")
    kept = {
        name: sorted((partners.folder / name / "state" / "sent" / session).glob("*/train-*"))
        for name in partners.data
    }
    assert [len(paths) for paths in kept.values()] == [2, 0, 1]
    with ZipFile(kept["site-02"][0]) as archive:
        loss = ConfigRecord.inflate(archive.read("payload"))["loss"]
    assert isinstance(loss, float)
    assert loss == round(loss)
    for name in partners.data:
        partners.write_policy(name)


# --- backbones


def new_backbone(partners: Partners, folder: Path) -> Manifest:
    """A backbone in ``folder`` with a weight that no other has; all sites allow it."""
    shutil.copytree(find_backbone("builtin:glyph-vit").folder, folder)
    weights = folder / "model.safetensors"
    flip(weights, weights.stat().st_size - 1 - len(partners.allowed))
    manifest = make_manifest(folder, source=f"path:{folder.name}")
    partners.allowed[folder.name] = f"sha256:{manifest.digest}"
    for name in partners.data:
        partners.write_policy(name)
    return manifest


def test_a_byte_that_flips_on_the_coordinators_disk(partners: Partners, tmp_path: Path) -> None:
    """During a run of two sites, so that the third is handed what is damaged."""
    manifest = new_backbone(partners, tmp_path / "flipped")
    source = f"backbone.source='path:{tmp_path / 'flipped'}'"
    partners.kill("site-02", signal.SIGTERM)
    run = partners.submit(
        small_job(partners.folder, source, "rounds.min_sites=2", "rounds.count=50")
    )
    partners.until(lambda: partners.rounds(run))
    weights = next(file for file in manifest.files if file.name == "model.safetensors")
    flip(BlobStore(partners.home / "backbones").file_path(weights), weights.size // 2)
    partners.start_sites(["site-02"])
    session = session_of(partners, run)

    def codes() -> set[str]:
        return {line["code"] for line in audit(partners, "site-02") if line["run"] == session}

    partners.until(lambda: "TransferError" in codes())
    assert not BlobStore(partners.folder / "site-02" / "state" / "backbones").complete(manifest)
    partners.call("coordinator", "stop", run, "--home", str(partners.home))
    assert {line["sites"] for line in partners.rounds(run)} == {2}

    # The coordinator does not start with it, and says why; imported again it is as it was.
    run = partners.submit(
        small_job(partners.folder, f"backbone.source='manifest:{manifest.digest}'")
    )
    partners.until(
        lambda: session_of(partners, run) and Run(partners.home / "runs" / run).events(), 60
    )
    said = Run(partners.home / "runs" / run).events()[-1]
    assert said["event"] == "waiting"
    assert manifest.digest[:12] in said["what"]
    partners.call("coordinator", "stop", run, "--home", str(partners.home))
    run = partners.submit(small_job(partners.folder, source))
    partners.until(lambda: partners.state(run) == "finished")
    assert partners.rounds(run)[-1]["sites"] == 3


class Hostile(services.BackbonesServicer):  # type: ignore[misc]
    """Hands out a manifest that has a pickle in it."""

    def __init__(self, manifest: Manifest) -> None:
        told = json.loads(manifest.to_json())
        told["files"].append({**told["files"][0], "name": "pytorch_model.bin"})
        self._manifest = json.dumps(told).encode()

    def GetManifest(self, request: Any, context: grpc.ServicerContext) -> Any:
        return pb.ManifestReply(manifest=self._manifest)


@contextmanager
def hostile(partners: Partners, manifest: Manifest) -> Iterator[None]:
    """Behind the real port, other services answer than the coordinator's."""
    ours = partners.home / "run" / "services.sock"
    hidden = ours.rename(ours.with_suffix(".hidden"))
    server = grpc.server(ThreadPoolExecutor(4))
    services.add_BackbonesServicer_to_server(Hostile(manifest), server)
    server.add_insecure_port(f"unix:{ours}")
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()
        hidden.rename(ours)


def test_a_coordinator_that_hands_out_a_pickle(partners: Partners, tmp_path: Path) -> None:
    manifest = new_backbone(partners, tmp_path / "pickled")
    job = small_job(partners.folder, f"backbone.source='path:{tmp_path / 'pickled'}'")
    with hostile(partners, manifest):
        codes, told = refused(partners, job)
    assert set(codes.values()) == told == {"BackboneError"}
    assert not list(partners.folder.glob("site-*/state/backbones/**/*.bin"))
    for site in partners.data:
        assert not BlobStore(partners.folder / site / "state" / "backbones").complete(manifest)


def test_a_folder_with_a_pickle_is_not_imported(partners: Partners, tmp_path: Path) -> None:
    shutil.copytree(find_backbone("builtin:glyph-vit").folder, tmp_path / "glyph")
    (tmp_path / "glyph" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    job = small_job(partners.folder, f"backbone.source='path:{tmp_path / 'glyph'}'")
    (tmp_path / "job.toml").write_text(dump_job(job))
    home = ("--home", str(partners.home))
    done = partners.call("submit", str(tmp_path / "job.toml"), *home, check=False)
    assert done.returncode == 2
    assert "pytorch_model.bin" in done.stderr
    assert not list(partners.home.glob("backbones/**/*.bin"))
