"""``fedgraft fetch``: what it stores, says and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import command
from support.models import contents, flip, write_model

from fedgraft.common.backbones.blob_store import BlobStore, make_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = write_model(tmp_path / "tiny-bert", chunks=1.5)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    return model


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site" / "site.toml"
    path.parent.mkdir()
    path.write_text('name = "a"\n[data]\ntrain = "x.jsonl"\n')
    return path


Capture = pytest.CaptureFixture[str]


def test_it_stores_the_model_and_says_what_the_policy_needs(
    model: Path, site: Path, capsys: Capture
) -> None:
    digest = make_manifest(model, source="x").digest
    code, out, err = command(capsys, "fetch", str(model), "--site", str(site))
    assert code == 0
    assert f'"tiny-bert" = "sha256:{digest}"' in out
    assert "6.3 MB in 3 files, licence mit" in out
    assert "storing 6.3/6.3 MB" in err
    folder = BlobStore(site.parent / "state" / "backbones").folder(digest)
    assert contents(folder).items() < contents(model).items()
    assert (site.parent / "state").stat().st_mode & 0o077 == 0


def test_json_and_a_second_time(model: Path, site: Path, capsys: Capture) -> None:
    arguments = ("fetch", str(model), "--site", str(site), "--json")
    code, out, _ = command(capsys, *arguments)
    told = json.loads(out)
    assert (code, told["name"], told["licence"]) == (0, "tiny-bert", "mit")
    assert told["bytes"] == sum(p.stat().st_size for p in Path(told["folder"]).iterdir())
    flip(Path(told["folder"]) / "model.safetensors", 9)
    assert command(capsys, *arguments, "--digest", told["digest"])[:2] == (0, out)
    store = BlobStore(site.parent / "state" / "backbones")
    store.check(make_manifest(model, source="x"))


@pytest.mark.parametrize(
    ("digest", "what"),
    [
        ("sha256:" + "0" * 64, "not the one asked for"),
        ("0" * 63, "no digest"),
        ("md5:1", "no digest"),
    ],
)
def test_another_digest_leaves_no_trace(
    model: Path, site: Path, capsys: Capture, digest: str, what: str
) -> None:
    code, out, err = command(capsys, "fetch", str(model), "--site", str(site), "--digest", digest)
    assert (code, out) == (2, "")
    assert what in err and "hint: " in err
    assert list(site.parent.iterdir()) == [site]


def test_what_is_no_model_leaves_no_trace(model: Path, site: Path, capsys: Capture) -> None:
    for spoil in (
        lambda: (model / "pytorch_model.bin").touch(),
        lambda: (model / "config.json").unlink(),
        lambda: model.rename(model.with_name("gone")),
    ):
        spoil()
        code, _, err = command(capsys, "fetch", str(model), "--site", str(site))
        assert code == 2 and "hint: " in err
    assert list(site.parent.iterdir()) == [site]


def test_a_store_that_cannot_be_made_is_said(model: Path, site: Path, capsys: Capture) -> None:
    (site.parent / "state").mkdir()
    (site.parent / "state" / "backbones").touch()
    code, _, err = command(capsys, "fetch", str(model), "--site", str(site))
    assert code == 1 and "state/backbones" in err and "Traceback" not in err


def test_two_at_once_leave_a_whole_backbone(model: Path, site: Path) -> None:
    run = [sys.executable, "-m", "fedgraft", "fetch", str(model), "--site", str(site)]
    both = [subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert 0 in [code for _, code in ends]
    assert all(code == 0 or b"another process" in err for err, code in ends)
    manifest = make_manifest(model, source="x")
    store = BlobStore(site.parent / "state" / "backbones")
    store.check(manifest)
    assert store.complete(manifest)
