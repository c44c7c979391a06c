"""Fetching a backbone: verified, resumed, mended; and what a liar at the other end achieves."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from support.backbone_server import Authority, serving
from support.models import contents, flip, write_model

from fedgraft.client.membership.backbone_client import TRIES_OF_A_CHUNK, WAITS, fetch_backbone
from fedgraft.common.backbones.blob_store import BlobStore, make_manifest
from fedgraft.common.backbones.manifest import CHUNK, Manifest
from fedgraft.common.errors import BackboneError, FedgraftError, MessageError, TransferError
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as rpc
from fedgraft.server.enrollment.backbone_service import BackboneService


class Coordinator(BackboneService):
    """Counts what it is asked for and spoils what ``mangle`` says, at most ``times`` times."""

    def __init__(self, store: BlobStore, *, times: int = 10**9) -> None:
        super().__init__(store)
        self.asked: list[int] = []
        self.streams = 0
        self.mangle: Callable[[rpc.Chunk, grpc.ServicerContext], rpc.Chunk | None] | None = None
        self.times = times
        self.manifest: bytes | None = None
        self.pause = 0.0
        self.sent: list[int] = []

    def GetManifest(self, request: Any, context: Any) -> Any:
        if self.manifest is not None:
            return rpc.ManifestReply(manifest=self.manifest)
        return super().GetManifest(request, context)

    def GetChunks(self, request: Any, context: Any) -> Iterator[rpc.Chunk]:
        self.asked += request.indexes
        self.streams += 1
        for piece in super().GetChunks(request, context):
            time.sleep(self.pause)
            if self.mangle is not None and self.times > 0:
                spoiled = self.mangle(piece, context)
                if spoiled is not piece:
                    self.times -= 1
                if spoiled is None:
                    continue
                piece = spoiled
            yield piece
            if piece.last:
                self.sent.append(piece.index)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def manifest(model: Path) -> Manifest:
    return make_manifest(model, source="m")


@pytest.fixture
def coordinator(tmp_path: Path, model: Path, manifest: Manifest) -> Coordinator:
    store = BlobStore(tmp_path / "coordinator")
    store.import_folder(model, manifest)
    return Coordinator(store)


@pytest.fixture
def channel(coordinator: Coordinator, tmp_path: Path) -> Iterator[grpc.Channel]:
    with (
        serving(coordinator, f"unix:{tmp_path}/s") as address,
        open_channel(address, b"", None, None) as channel,
    ):
        yield channel


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "site")


def no_sleep(seconds: float) -> None:
    pytest.fail(f"waits {seconds} s for nothing")


def test_what_is_fetched_is_the_same_and_comes_once(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    model: Path,
    manifest: Manifest,
) -> None:
    told: list[tuple[int, int]] = []
    allowed: list[Manifest] = []
    folder = fetch_backbone(
        channel,
        manifest.digest,
        store,
        progress=lambda *at: told.append(at),
        allowed=allowed.append,
    )
    assert contents(folder) == contents(model)
    assert told[-1] == (manifest.size, manifest.size)
    assert allowed == [manifest]
    assert coordinator.asked == [0, 1, 2, 3, 4] and coordinator.streams == 1
    assert fetch_backbone(channel, manifest.digest, store) == folder
    assert coordinator.streams == 1


def test_over_mutual_tls(
    coordinator: Coordinator, store: BlobStore, model: Path, manifest: Manifest
) -> None:
    authority = Authority()
    site = authority.issue("a")
    with (
        serving(coordinator, "127.0.0.1:0", authority) as address,
        open_channel(address, authority.certificate, site.key, site.certificate) as channel,
    ):
        assert contents(fetch_backbone(channel, manifest.digest, store)) == contents(model)


def test_what_is_complete_needs_no_coordinator(
    store: BlobStore, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    store.import_folder(model, manifest)
    with open_channel(f"unix:{tmp_path}/nobody", b"", None, None) as channel:
        assert contents(fetch_backbone(channel, manifest.digest, store)) == contents(model)


def test_what_is_not_allowed_leaves_no_trace(
    channel: grpc.Channel, coordinator: Coordinator, store: BlobStore, manifest: Manifest
) -> None:
    def refuse(manifest: Manifest) -> None:
        raise FedgraftError(f"not {manifest.source}")

    with pytest.raises(FedgraftError, match="not m"):
        fetch_backbone(channel, manifest.digest, store, allowed=refuse)
    assert coordinator.streams == 0
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_a_flipped_byte_on_the_way_is_fetched_again(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    model: Path,
    manifest: Manifest,
) -> None:
    coordinator.times = 2
    coordinator.mangle = lambda piece, _: flipped(piece) if piece.index == 2 else piece
    folder = fetch_backbone(channel, manifest.digest, store)
    assert contents(folder) == contents(model)
    assert coordinator.asked == [0, 1, 2, 3, 4, 2]


def flipped(piece: rpc.Chunk) -> rpc.Chunk:
    data = bytearray(piece.data)
    data[len(data) // 2] ^= 1
    return rpc.Chunk(index=piece.index, data=bytes(data), last=piece.last)


def test_a_chunk_that_never_arrives_whole_is_given_up_and_named(
    channel: grpc.Channel, coordinator: Coordinator, store: BlobStore, manifest: Manifest
) -> None:
    flip(coordinator._store.file_path(manifest.files[1]), CHUNK + 9)
    with pytest.raises(TransferError, match=r"4,194,304 to 8,388,608 of model\.safetensors") as why:
        fetch_backbone(channel, manifest.digest, store)
    assert "import the backbone again" in why.value.hint
    assert coordinator.asked == [0, 1, 2, 3, 4, *[2] * (TRIES_OF_A_CHUNK - 1)]
    assert store.missing(manifest) == (2,)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda piece: rpc.Chunk(index=piece.index + 1, data=piece.data, last=piece.last),
        lambda piece: rpc.Chunk(index=piece.index, data=b"", last=False),
        lambda piece: rpc.Chunk(index=piece.index, data=piece.data * 5, last=piece.last),
        lambda piece: rpc.Chunk(index=piece.index, data=piece.data, last=False),
        lambda piece: None,
    ],
    ids=["another chunk", "nothing", "too much", "no end", "less"],
)
def test_what_was_not_asked_for_ends_the_fetch(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    manifest: Manifest,
    spoil: Callable[[rpc.Chunk], rpc.Chunk | None],
) -> None:
    coordinator.mangle = lambda piece, _: spoil(piece) if piece.index == 3 else piece
    with pytest.raises(MessageError):
        fetch_backbone(channel, manifest.digest, store)
    assert not store.complete(manifest)
    assert not (store.root / "models" / manifest.digest).exists()


def test_a_chunk_cut_short_is_a_damaged_one(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    model: Path,
    manifest: Manifest,
) -> None:
    coordinator.times = 1
    coordinator.mangle = lambda piece, _: (
        rpc.Chunk(index=3, data=piece.data[:-1], last=piece.last) if piece.index == 3 else piece
    )
    assert contents(fetch_backbone(channel, manifest.digest, store)) == contents(model)


@pytest.mark.parametrize(
    ("forged", "what"),
    [
        (b"", "no manifest"),
        (b"{}", "no manifest"),
        (b'{"files":[{"name":"../x"}]}', "no manifest"),
        (b"other", "no manifest"),
    ],
)
def test_a_forged_manifest_is_refused(
    channel: grpc.Channel, coordinator: Coordinator, store: BlobStore, forged: bytes, what: str
) -> None:
    coordinator.manifest = forged
    with pytest.raises(BackboneError, match=what):
        fetch_backbone(channel, "0" * 64, store)


def test_another_manifest_than_was_asked_for_is_refused(
    channel: grpc.Channel, coordinator: Coordinator, store: BlobStore, manifest: Manifest
) -> None:
    coordinator.manifest = manifest.to_json()
    with pytest.raises(BackboneError, match="not of 000000000000"):
        fetch_backbone(channel, "0" * 64, store)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_an_unknown_backbone_is_said_at_once(channel: grpc.Channel, store: BlobStore) -> None:
    with pytest.raises(TransferError, match="no such backbone"):
        fetch_backbone(channel, "0" * 64, store, sleep=no_sleep)


def test_a_full_disk_is_noticed_before_anything_is_asked_for(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = SimpleNamespace(free=manifest.size)
    monkeypatch.setattr("fedgraft.common.backbones.blob_store.shutil.disk_usage", lambda _: full)
    with pytest.raises(TransferError, match="GB free"):
        fetch_backbone(channel, manifest.digest, store)
    assert coordinator.streams == 0
    assert list((store.root / "partial").iterdir()) == []


def test_streams_that_break_are_taken_up_where_they_were(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    model: Path,
    manifest: Manifest,
) -> None:
    def abort(piece: rpc.Chunk, context: grpc.ServicerContext) -> rpc.Chunk:
        if coordinator.streams <= 3 and piece.last and piece.index == coordinator.streams:
            context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
        return piece

    coordinator.mangle = abort
    waited: list[float] = []
    folder = fetch_backbone(channel, manifest.digest, store, sleep=waited.append)
    assert contents(folder) == contents(model)
    assert coordinator.streams == 4
    assert coordinator.asked == [0, 1, 2, 3, 4, 1, 2, 3, 4, 2, 3, 4, 3, 4]
    assert waited == [WAITS[0]] * 3


def test_patience_with_a_line_that_never_works_ends(
    store: BlobStore, manifest: Manifest, tmp_path: Path
) -> None:
    waited: list[float] = []
    with (
        open_channel(f"unix:{tmp_path}/nobody", b"", None, None) as channel,
        pytest.raises(TransferError, match="does not answer"),
    ):
        fetch_backbone(channel, manifest.digest, store, sleep=waited.append)
    assert waited == list(WAITS)


def test_a_coordinator_that_comes_back_is_found(
    coordinator: Coordinator, store: BlobStore, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/s"
    coordinator.pause = 0.05
    found: list[Path] = []
    with open_channel(address, b"", None, None) as channel:

        def fetch() -> None:
            found.append(fetch_backbone(channel, manifest.digest, store))

        site = threading.Thread(target=fetch)
        with serving(coordinator, address):
            site.start()
            while not coordinator.sent:
                time.sleep(0.01)
        time.sleep(0.3)
        coordinator.pause = 0.0
        with serving(coordinator, address):
            site.join(30)
    assert [contents(folder) for folder in found] == [contents(model)]


FETCH = """
import sys
from pathlib import Path
from fedgraft.client.membership.backbone_client import fetch_backbone
from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.messages.grpc_channel import open_channel
address, digest, root = sys.argv[1:]
with open_channel(address, b"", None, None) as channel:
    print("ready", flush=True)
    fetch_backbone(channel, digest, BlobStore(Path(root)))
"""


@pytest.mark.slow
def test_killed_at_any_byte_it_fetches_at_most_one_chunk_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chunks=9.5)
    manifest = make_manifest(model, source="m")
    served = BlobStore(tmp_path / "coordinator")
    served.import_folder(model, manifest)
    coordinator = Coordinator(served)
    coordinator.pause = 0.02  # a piece: slow enough that hardly anything is on its way unread
    store = BlobStore(tmp_path / "site")
    moments = random.Random(5)
    with serving(coordinator, f"unix:{tmp_path}/s") as address:
        command = [sys.executable, "-c", FETCH, address, manifest.digest, str(store.root)]
        lives = 0
        while not store.complete(manifest):
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout and process.stdout.readline() == b"ready\n"
            try:
                process.wait(moments.uniform(0.05, 0.35) if lives < 8 else 30)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            lives += 1
    assert lives > 2
    again = len(coordinator.sent) - len(manifest.chunks)
    assert again <= lives - 1  # what was sent whole, and sent again after a death
    assert contents(store.folder(manifest.digest)) == contents(model)
    store.check(manifest)


def test_bits_that_flipped_at_the_site_are_fetched_again(
    channel: grpc.Channel,
    coordinator: Coordinator,
    store: BlobStore,
    model: Path,
    manifest: Manifest,
) -> None:
    folder = fetch_backbone(channel, manifest.digest, store)
    flip(folder / "model.safetensors", CHUNK)
    with pytest.raises(BackboneError, match=r"model\.safetensors"):
        store.check(manifest)
    coordinator.asked.clear()
    assert contents(fetch_backbone(channel, manifest.digest, store)) == contents(model)
    assert coordinator.asked == [2]
    os.truncate(store.root / "files" / manifest.files[2].content, 1)
    coordinator.asked.clear()
    assert contents(fetch_backbone(channel, manifest.digest, store)) == contents(model)
    assert coordinator.asked == [4]
