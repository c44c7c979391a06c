"""The doctor on the line's rate: measured on a backbone that a job could have fetched anyway."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.clinic import MANIFEST, Coordinator, Site, look, states

from fedgraft.client.doctor.bandwidth import ENOUGH, _first_chunks, rate
from fedgraft.client.doctor.checklist import Check
from fedgraft.client.doctor.local import Patient
from fedgraft.client.doctor.network import coordinator as greet
from fedgraft.client.policy.approvals import Agreements
from fedgraft.client.policy.disclosure import Disclosure
from fedgraft.common.backbones.manifest import CHUNK, Chunk
from fedgraft.common.errors import SiteFailure

ONLY = (Check("coordinator", greet), Check("rate", rate, ("coordinator",)))
LEAVING = Disclosure(("a.lora_A", "a.lora_B"), 1_000, 230_000, 10, masked=True)


def propose(site: Site, session: str, leaving: Disclosure, asked: float) -> None:
    agreements = Agreements(site.state / "approvals", clock=lambda: asked)
    with pytest.raises(SiteFailure):
        agreements.propose(session, "{}", ("a",), asdict(leaving), backbone="", ask=True)


def test_a_rate_and_the_most_that_may_leave(site: Site) -> None:
    what = look(site, ONLY)["rate"].what
    said = re.fullmatch(
        r"([\d.]+) MB/s from the coordinator \(([\d.]+) MB in [\d.]+ s\); "
        r"the most that may leave in a round, 20 MB: ([\d.]+) s at this rate",
        what,
    )
    assert said, what
    speed, came, seconds = map(float, said.groups())
    assert came == round(MANIFEST.size / 1e6, 1)
    assert seconds == pytest.approx(20 / speed, abs=0.06 + 20 / speed * 0.06 / speed)


def test_the_newest_job_that_nobody_denied_says_what_a_round_is(site: Site) -> None:
    propose(site, "1" * 32, LEAVING, 1.0)
    propose(site, "2" * 32, Disclosure(("b",), 5, 99, 3, masked=False), 2.0)
    assert "in the newest job would leave 1 tensors with 5 values" in look(site, ONLY)["rate"].what
    agreements = Agreements(site.state / "approvals")
    agreements.decide(agreements.named("2"), approve=False)
    what = look(site, ONLY)["rate"].what
    assert f"in the newest job would leave {LEAVING.in_words()}: " in what


def test_nothing_is_measured_where_no_allowed_backbone_is_offered(site: Site) -> None:
    for digests in ((), ("0" * 64,)):
        site.allow(*digests)
        found = look(site)
        assert states(found) == {"rate": "skipped"}
        assert "no backbone yet that the policy allows" in found["rate"].what
    site.allow("0" * 64, MANIFEST.digest)  # the first that is there
    assert states(look(site)) == {}


def test_a_coordinator_that_stops_answering_fails_nothing(site: Site) -> None:
    class Silent(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    def fails(*_: object, **__: object) -> Any:
        raise Silent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgraft.client.doctor.bandwidth._measured", fails)
        found = look(site, ONLY)
    assert found["rate"].what == "not measured (unavailable)"


def test_a_slow_line_is_cut_off_and_still_measured(
    site: Site, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgraft.client.doctor.bandwidth.PATIENCE", 0.5)
    monkeypatch.setattr("fedgraft.server.enrollment.backbone_service.PIECE", 1_000)
    coordinator.pause = 0.05
    finding = rate(Patient(site.file))
    assert finding.state == "ok"
    speed = float(finding.what.partition(" ")[0])
    assert speed < 0.1  # MB/s: 1000 bytes every 50 ms


def test_no_more_is_fetched_than_is_enough(tmp_path: Path) -> None:
    from types import SimpleNamespace

    chunks = [Chunk(None, n * CHUNK, CHUNK, "") for n in range(1000)]  # type: ignore[arg-type]
    taken = _first_chunks(SimpleNamespace(chunks=chunks))  # type: ignore[arg-type]
    assert taken == list(range(len(taken)))
    assert ENOUGH <= len(taken) * CHUNK < ENOUGH + CHUNK
