"""The store of backbones: whole or not there, shared, verified, mended, killed anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.matrix import tries
from support.models import contents, flip, write_model

from fedgraft.common.backbones.blob_store import (
    BlobStore,
    Manifest,
    make_manifest,
    open_store,
    set_store,
)
from fedgraft.common.backbones.load import find_backbone
from fedgraft.common.backbones.manifest import CHUNK
from fedgraft.common.config.sections import Backbone
from fedgraft.common.errors import BackboneError, MessageError, RunError, TransferError
from fedgraft.common.files import lock_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def manifest(model: Path) -> Manifest:
    return make_manifest(model, source="m")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "backbones")


def piece(model: Path, manifest: Manifest, index: int) -> bytes:
    chunk = manifest.chunks[index]
    return (model / chunk.file.name).read_bytes()[chunk.offset : chunk.offset + chunk.length]


def test_an_imported_folder_is_the_same_and_lies_there_once(
    store: BlobStore, model: Path, manifest: Manifest
) -> None:
    assert not store.complete(manifest)
    told: list[tuple[int, int]] = []
    folder = store.import_folder(model, manifest, progress=lambda *at: told.append(at))
    assert contents(folder) == contents(model)
    assert told[-1] == (manifest.size, manifest.size)
    assert store.complete(manifest) and store.missing(manifest) == ()
    assert store.manifest(manifest.digest) == manifest
    blocks = {p.stat().st_ino: p.stat().st_size for p in store.root.rglob("*") if p.is_file()}
    assert sum(blocks.values()) < manifest.size + 10_000
    assert list((store.root / "partial").iterdir()) == []
    assert store.root.stat().st_mode & 0o077 == 0


def test_chunks_count_once_confirmed(store: BlobStore, model: Path, manifest: Manifest) -> None:
    every = tuple(range(len(manifest.chunks)))
    with store.receive(manifest) as receiver:
        assert receiver.missing == every
        assert receiver.done == 0
        receiver.write(2, 0, piece(model, manifest, 2)[:1000])
        assert not receiver.confirm(2)
        receiver.write(2, 1000, piece(model, manifest, 2)[1000:])
        assert receiver.confirm(2)
        assert receiver.missing == (0, 1, 3, 4)
        assert receiver.done == CHUNK
    assert not store.complete(manifest)
    with pytest.raises(BackboneError):
        store.folder(manifest.digest)
    assert store.missing(manifest) == (0, 1, 3, 4)
    store.import_folder(model, manifest)
    assert store.complete(manifest)


def test_bytes_beyond_a_chunk_are_refused(store: BlobStore, manifest: Manifest) -> None:
    with store.receive(manifest) as receiver, pytest.raises(MessageError):
        receiver.write(1, CHUNK - 1, b"xx")


def test_a_second_backbone_takes_only_what_differs(
    store: BlobStore, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    first = store.import_folder(model, manifest)
    other = shutil.copytree(model, tmp_path / "other")
    (other / "vocab.txt").write_text("c\n")
    (other / "model.safetensors").rename(other / "renamed.safetensors")
    second = make_manifest(other, source="other")
    assert [second.chunks[index].file.name for index in store.missing(second)] == ["vocab.txt"]
    folder = store.import_folder(other, second)
    assert (folder / "renamed.safetensors").samefile(first / "model.safetensors")
    assert contents(folder) == contents(other)


def test_files_with_one_content_and_empty_ones(store: BlobStore, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chunks=1.5)
    shutil.copy(model / "model.safetensors", model / "twin.safetensors")
    for name in ("empty.txt", "nothing.txt"):
        (model / name).touch()
    manifest = make_manifest(model, source="m")
    assert len(store.missing(manifest)) == 4  # of 6 chunks
    assert contents(store.import_folder(model, manifest)) == contents(model)


def test_zeros_are_bytes_like_others(store: BlobStore, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chunks=0.1)
    os.truncate(model / "model.safetensors", 3 * CHUNK)
    manifest = make_manifest(model, source="m")
    assert contents(store.import_folder(model, manifest)) == contents(model)
    store.check(manifest)


@pytest.mark.parametrize("place", [0, CHUNK + 5, 2 * CHUNK + CHUNK // 2 - 1])
def test_a_flipped_bit_is_named_and_only_its_chunk_is_fetched_again(
    store: BlobStore, model: Path, manifest: Manifest, place: int
) -> None:
    folder = store.import_folder(model, manifest)
    store.check(manifest)
    flip(folder / "model.safetensors", place)
    with pytest.raises(BackboneError, match=r"model\.safetensors .* changed on disk"):
        store.check(manifest)
    assert store.missing(manifest) == (1 + place // CHUNK,)
    with pytest.raises(BackboneError, match="damaged"):
        store.folder(manifest.digest)
    assert contents(store.import_folder(model, manifest)) == contents(model)


def test_importing_again_mends_what_nobody_had_noticed(
    store: BlobStore, model: Path, manifest: Manifest
) -> None:
    flip(store.import_folder(model, manifest) / "model.safetensors", 7)
    assert contents(store.import_folder(model, manifest)) == contents(model)


@pytest.mark.parametrize("size", [0, 1, CHUNK, 3 * CHUNK])
def test_a_file_cut_or_grown_is_noticed_and_mended(
    store: BlobStore, model: Path, manifest: Manifest, size: int
) -> None:
    folder = store.import_folder(model, manifest)
    (folder / "model.safetensors").chmod(0o600)
    os.truncate(folder / "model.safetensors", size)
    assert not store.complete(manifest)
    with pytest.raises(BackboneError, match="damaged"):
        store.folder(manifest.digest)
    assert contents(store.import_folder(model, manifest)) == contents(model)


def test_a_folder_that_was_touched_is_refused_and_mended(
    store: BlobStore, model: Path, manifest: Manifest
) -> None:
    folder = store.import_folder(model, manifest)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").write_text("other")
    with pytest.raises(BackboneError, match="damaged"):
        store.folder(manifest.digest)
    assert contents(store.import_folder(model, manifest)) == contents(model)


def test_a_damaged_manifest_is_not_believed(
    store: BlobStore, model: Path, manifest: Manifest
) -> None:
    store.import_folder(model, manifest)
    path = store.root / "manifests" / f"{manifest.digest}.json"
    for content in (b"", path.read_bytes()[:-9], make_manifest(model, source="x").to_json()[:-1]):
        path.write_bytes(content)
        with pytest.raises(BackboneError):
            store.manifest(manifest.digest)
    assert contents(store.import_folder(model, manifest)) == contents(model)


def test_another_copy_is_not_taken_for_it(
    store: BlobStore, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    flip(other / "model.safetensors", CHUNK + 1)
    with pytest.raises(BackboneError, match=r"model\.safetensors .* not what the manifest says"):
        store.import_folder(other, manifest)
    (other / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"no model\.safetensors"):
        store.import_folder(other, manifest)
    assert not store.complete(manifest)


def test_a_full_disk_is_noticed_before_anything_is_written(
    store: BlobStore, model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=manifest.size + 1000)
    monkeypatch.setattr("fedgraft.common.backbones.blob_store.shutil.disk_usage", lambda _: full)
    with pytest.raises(TransferError, match="GB free") as refused:
        store.import_folder(model, manifest)
    assert "make room" in refused.value.hint
    assert list((store.root / "partial").iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_came(
    store: BlobStore, model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.pwrite
    left = [2]

    def pwrite(file: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return written(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(TransferError, match="full"), store.receive(manifest) as receiver:
        for index in receiver.missing:
            receiver.write(index, 0, piece(model, manifest, index))
            assert receiver.confirm(index)
    assert store.missing(manifest) == (2, 3, 4)


def test_one_process_at_a_time_receives(store: BlobStore, model: Path, manifest: Manifest) -> None:
    code = (
        "import sys; from pathlib import Path; from fedgraft.common.files import lock_folder;"
        "held = lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin and other.stdout
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match="another process"):
        store.import_folder(model, manifest)
    other.communicate()
    store.import_folder(model, manifest)
    lock_folder(store.root).close()


def test_two_that_write_at_once_write_the_same(
    store: BlobStore, model: Path, manifest: Manifest
) -> None:
    """Without the lock even: within one process it keeps nobody out."""
    twin = BlobStore(store.root)
    with store.receive(manifest) as one, twin.receive(manifest) as two:
        for index in one.missing:
            for receiver in (one, two):
                receiver.write(index, 0, piece(model, manifest, index))
                assert receiver.confirm(index)
    assert contents(store.folder(manifest.digest)) == contents(model)


IMPORT = """
import sys
from pathlib import Path
from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.backbones.manifest import make_manifest
model, store = map(Path, sys.argv[1:])
manifest = make_manifest(model, source="m")
print("ready", flush=True)
BlobStore(store).import_folder(model, manifest)
"""


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chunks=12.5)
    manifest = make_manifest(model, source="m")
    store = BlobStore(tmp_path / "backbones")
    left = len(manifest.chunks)
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04):
        process = subprocess.Popen(
            [sys.executable, "-c", IMPORT, str(model), str(store.root)], stdout=subprocess.PIPE
        )
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(store.missing(manifest)) <= left
        left = len(store.missing(manifest))
    assert contents(store.import_folder(model, manifest)) == contents(model)
    store.check(manifest)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=tries(25))
def test_whatever_happens_to_a_partial_file_it_is_mended(
    data: st.DataObject, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    store = BlobStore(tmp_path / "any")
    weights = manifest.files[1]
    partial = store.root / "partial" / weights.content
    shutil.copy(model / weights.name, partial)
    bad = set(data.draw(st.lists(st.integers(0, weights.size - 1), max_size=3)))
    for place in bad:
        flip(partial, place)
    size = data.draw(st.integers(0, 2 * weights.size) | st.just(weights.size))
    os.truncate(partial, size)
    damaged = {
        chunk.offset // CHUNK
        for chunk in weights.split()
        if any(chunk.offset <= at < chunk.offset + chunk.length for at in bad)
        or chunk.offset + chunk.length > size
    }
    assert {index - 1 for index in store.missing(manifest)} - {-1, 3} == damaged
    assert contents(store.import_folder(model, manifest)) == contents(model)
    shutil.rmtree(store.root)


def test_a_job_names_a_backbone_by_its_manifest(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m", chunks=1.1)
    manifest = make_manifest(model, source="m")
    source = f"manifest:{manifest.digest}"
    assert Backbone(source=source).source == source
    for wrong in ("manifest:", "manifest:ab", f"manifest:{manifest.digest.upper()}", source + "0"):
        with pytest.raises(ValueError, match="pattern"):
            Backbone(source=wrong)
    monkeypatch.delenv("FEDGRAFT_BACKBONES", raising=False)
    with pytest.raises(BackboneError, match="no store"):
        find_backbone(source)
    monkeypatch.setenv("FEDGRAFT_BACKBONES", "")
    set_store(store.root)
    assert open_store().root == store.root
    with pytest.raises(BackboneError, match="no backbone"):
        find_backbone(source)
    folder = store.import_folder(model, manifest)
    found = find_backbone(source)
    assert found.folder == folder
    assert found.fingerprint == find_backbone(f"path:{model}").fingerprint
    flip(folder / "model.safetensors", 3)
    with pytest.raises(BackboneError, match=r"model\.safetensors"):
        find_backbone(source)


@pytest.mark.parametrize("config", [{"auto_map": {}}, []])
def test_what_a_store_holds_is_still_checked_before_it_is_loaded(
    store: BlobStore, config: object, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m", chunks=0.1)
    honest = make_manifest(model, source="m")
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError):
        make_manifest(model, source="m")
    assert honest.digest
