"""A job's backbone: fetched once from the coordinator, and never where there is no need."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.clinic import MANIFEST, Authority, Coordinator, Site

from fedgraft.client.membership.backbone_fetch import _Progress, ensure_backbone
from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import FedgraftError

SOURCE = f"manifest:{MANIFEST.digest}"


def job_with(source: str) -> Job:
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": ["a", "b"]},
        "backbone": {"source": source},
        "method": {"kind": "head"},
    }
    return parse_job(raw, where="test")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path / "site", Authority(), "localhost:1")  # where nobody answers
    monkeypatch.setenv("FEDGRAFT_BACKBONES", str(made.state / "backbones"))
    return made


def store_of(site: Site) -> BlobStore:
    return BlobStore(site.state / "backbones")


def test_it_is_fetched_once(site: Site, tmp_path: Path) -> None:
    with Coordinator(tmp_path / "store").serve(site.authority) as port:
        site.endpoint(f"localhost:{port}")
        ensure_backbone(job_with(SOURCE), site.state)
    assert store_of(site).complete(store_of(site).manifest(MANIFEST.digest))
    site.endpoint("localhost:1")
    ensure_backbone(job_with(SOURCE), site.state)  # nobody is asked


@pytest.mark.parametrize("source", ["builtin:glyph-vit", "hf:someone/model"])
def test_a_backbone_that_is_not_the_coordinators_is_none_of_its_business(
    site: Site, source: str
) -> None:
    ensure_backbone(job_with(source), site.state)
    assert not (site.state / "backbones").exists()


def test_what_was_imported_by_post_is_not_fetched(site: Site) -> None:
    from support.clinic import BUILTIN

    store_of(site).import_folder(BUILTIN, MANIFEST)
    ensure_backbone(job_with(SOURCE), site.state)


def test_half_a_backbone_is_completed(site: Site, tmp_path: Path) -> None:
    with Coordinator(tmp_path / "store").serve(site.authority) as port:
        site.endpoint(f"localhost:{port}")
        ensure_backbone(job_with(SOURCE), site.state)
        store = store_of(site)
        store.file_path(MANIFEST.files[0]).unlink()
        ensure_backbone(job_with(SOURCE), site.state)
    assert store.complete(store.manifest(MANIFEST.digest))


def test_a_coordinator_that_does_not_have_it_is_named(site: Site, tmp_path: Path) -> None:
    with Coordinator(tmp_path / "store").serve(site.authority) as port:
        site.endpoint(f"localhost:{port}")
        with pytest.raises(FedgraftError, match="has no such backbone"):
            ensure_backbone(job_with("manifest:" + "0" * 64), site.state)


def test_progress_is_told_now_and_then_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedgraft.client")
    now = [100.0]
    monkeypatch.setattr("fedgraft.client.membership.backbone_fetch.time.monotonic", lambda: now[0])
    tell: Any = _Progress()

    def after(seconds: float, done: float) -> None:
        now[0] += seconds
        tell(int(done), 1_000_000_000)

    after(0, 200e6)  # was here before
    after(4, 240e6)  # too soon
    after(1, 250e6)
    after(1, 260e6)
    after(9, 1e9)
    assert [record.getMessage() for record in caplog.records] == [
        "backbone: 250 of 1,000 MB at 10 MB/s, 75 s left",
        "backbone: 1,000 of 1,000 MB at 53 MB/s",
    ]


def test_a_backbone_that_was_all_here_has_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedgraft.client")
    _Progress()(5_000_000, 5_000_000)
    assert caplog.records[0].getMessage() == "backbone: 5 of 5 MB at 0 MB/s"
