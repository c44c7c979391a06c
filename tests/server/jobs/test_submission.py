"""What submitting makes of a job: checked against the federation, its backbone ready."""

import re
from pathlib import Path

import pytest
from support.memberships import NAMES, write_plan
from support.models import write_model

from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.errors import BackboneError, FedgraftError, InputError
from fedgraft.server.enrollment.provision import found, revoke
from fedgraft.server.jobs.submission import prepare_job
from fedgraft.server.paths import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found(write_plan(tmp_path), tmp_path / "coordinator", tmp_path / "kits")
    return Home(tmp_path / "coordinator")


def text_of(source: str = "builtin:glyph-vit", *, min_sites: int = 3, task: str = "image") -> str:
    raw = {
        "job": {"name": "trial", "task": f"{task}-classification", "labels": ["a", "b"]},
        "backbone": {"source": source},
        "method": {"kind": "head"},
        "rounds": {"min_sites": min_sites, "count": 2},
        "simulation": {"sites": 9, "train": "nowhere.jsonl"},
    }
    return dump_job(parse_job(raw, where="test"))


def source_of(job: Job) -> str:
    return job.backbone.source


def test_a_run_is_named_by_time_and_job(home: Home) -> None:
    name, job = prepare_job(text_of(), home)
    assert re.fullmatch(r"\d{8}-\d{6}-trial-[0-9a-f]{4}", name)
    assert source_of(job) == "builtin:glyph-vit"  # in every install
    assert not home.file("backbones").exists()


def test_names_differ_within_a_second(home: Home) -> None:
    assert len({prepare_job(text_of(), home)[0] for _ in range(20)}) == 20


def test_what_is_of_the_simulation_does_not_reach_sites(home: Home) -> None:
    assert prepare_job(text_of(), home)[1].simulation is None


def test_more_sites_than_there_are_is_refused(home: Home) -> None:
    with pytest.raises(InputError, match="min_sites is 4, and the federation has 3") as error:
        prepare_job(text_of(min_sites=4), home)
    assert error.value.hint
    revoke(home.folder, NAMES[0])
    with pytest.raises(InputError, match="min_sites is 3, and the federation has 2"):
        prepare_job(text_of(), home)
    prepare_job(text_of(min_sites=2), home)


def test_a_backbone_is_named_by_what_it_is_and_ready(home: Home, tmp_path: Path) -> None:
    model = write_model(tmp_path / "secret-place" / "m")
    _, job = prepare_job(text_of(f"path:{model}", task="text"), home)
    assert source_of(job).startswith("manifest:")
    store = BlobStore(home.file("backbones"))
    manifest = store.manifest(source_of(job).removeprefix("manifest:"))
    assert store.complete(manifest)
    assert manifest.source == "path:m"  # where it lay is nobody's business
    assert "secret-place" not in dump_job(job) + manifest.to_json().decode()


def test_the_same_backbone_is_kept_once(home: Home, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    text = text_of(f"path:{model}", task="text")
    assert source_of(prepare_job(text, home)[1]) == source_of(prepare_job(text, home)[1])
    assert len(list((home.file("backbones") / "manifests").iterdir())) == 1


def test_a_manifest_stays_what_it_is(home: Home) -> None:
    source = "manifest:" + "ab" * 32
    assert source_of(prepare_job(text_of(source), home)[1]) == source


@pytest.mark.parametrize(
    "text", ["[job]\nnam = 1\n", 'job = "x"\n', ""], ids=["a key", "a type", "nothing"]
)
def test_a_wrong_job_is_named_before_anything_is_written(home: Home, text: str) -> None:
    before = sorted(home.folder.rglob("*"))
    with pytest.raises(FedgraftError, match="job"):
        prepare_job(text, home)
    assert sorted(home.folder.rglob("*")) == before


def test_a_backbone_that_is_not_there_leaves_nothing(home: Home, tmp_path: Path) -> None:
    before = sorted(home.folder.rglob("*"))
    with pytest.raises((InputError, BackboneError)):
        prepare_job(text_of(f"path:{tmp_path / 'none'}"), home)
    assert sorted(home.folder.rglob("*")) == before
