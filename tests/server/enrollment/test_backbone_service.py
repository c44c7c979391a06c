"""The service that hands backbones out: what it sends, what it refuses, how little it holds."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from support import backbone_server
from support.backbone_server import Authority, serving
from support.models import contents, write_model

from fedgraft.common.backbones.blob_store import BlobStore, make_manifest
from fedgraft.common.backbones.manifest import CHUNK, Manifest
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as rpc
from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import BackbonesStub
from fedgraft.server.enrollment.backbone_service import PIECE, BackboneService


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def store(tmp_path: Path, model: Path) -> BlobStore:
    store = BlobStore(tmp_path / "backbones")
    store.import_folder(model, make_manifest(model, source="m"))
    return store


@pytest.fixture
def manifest(model: Path) -> Manifest:
    return make_manifest(model, source="m")


@pytest.fixture
def stub(store: BlobStore, tmp_path: Path) -> Iterator[BackbonesStub]:
    with (
        serving(BackboneService(store), f"unix:{tmp_path}/s") as address,
        open_channel(address, b"", None, None) as channel,
    ):
        yield BackbonesStub(channel)


def refusal(call: Callable[[], Iterable[object]]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refused:
        list(call())
    code: grpc.StatusCode = refused.value.code()
    return code


def test_the_manifest_by_its_digest(stub: BackbonesStub, manifest: Manifest) -> None:
    reply = stub.GetManifest(rpc.ManifestRequest(digest=manifest.digest))
    assert Manifest.from_json(reply.manifest) == manifest


@pytest.mark.parametrize("digest", ["", "0" * 64, "../manifests/x", "a/../" * 20, "x\0"])
def test_unknown_digests_are_not_found(stub: BackbonesStub, digest: str) -> None:
    asked = rpc.ManifestRequest(digest=digest)
    assert refusal(lambda: stub.GetManifest(asked)) == grpc.StatusCode.NOT_FOUND
    chunks = stub.GetChunks(rpc.ChunksRequest(digest=digest, indexes=[0]))
    assert refusal(lambda: chunks) == grpc.StatusCode.NOT_FOUND


def test_chunks_in_the_order_asked_for_in_pieces(
    stub: BackbonesStub, manifest: Manifest, model: Path
) -> None:
    wanted = [3, 4, 0, 1]
    pieces = list(stub.GetChunks(rpc.ChunksRequest(digest=manifest.digest, indexes=wanted)))
    assert all(0 < len(piece.data) <= PIECE for piece in pieces)
    came = b"".join(piece.data for piece in pieces)
    weights = (model / "model.safetensors").read_bytes()
    small = [(model / name).read_bytes() for name in ("vocab.txt", "config.json")]
    assert came == weights[2 * CHUNK :] + b"".join(small) + weights[:CHUNK]
    assert [piece.index for piece in pieces if piece.last] == wanted


def test_nothing_asked_for_is_nothing(stub: BackbonesStub, manifest: Manifest) -> None:
    assert list(stub.GetChunks(rpc.ChunksRequest(digest=manifest.digest))) == []


@pytest.mark.parametrize("indexes", [[5], [0, 5], [2**32 - 1], [1, 1], [0] * 100_000])
def test_indexes_that_are_none_or_come_twice_are_refused(
    stub: BackbonesStub, manifest: Manifest, indexes: list[int]
) -> None:
    chunks = stub.GetChunks(rpc.ChunksRequest(digest=manifest.digest, indexes=indexes))
    assert refusal(lambda: chunks) == grpc.StatusCode.INVALID_ARGUMENT


def test_a_file_that_is_gone_or_cut_is_said(
    stub: BackbonesStub, manifest: Manifest, store: BlobStore
) -> None:
    path = store.file_path(manifest.files[1])
    path.chmod(0o600)
    for damage in (lambda: path.write_bytes(b"short"), path.unlink):
        damage()
        asked = rpc.ChunksRequest(digest=manifest.digest, indexes=[1])
        assert refusal(partial(stub.GetChunks, asked)) == grpc.StatusCode.DATA_LOSS


def test_mutual_tls_keeps_others_out(store: BlobStore, manifest: Manifest) -> None:
    authority, stranger = Authority(), Authority()
    site = authority.issue("a")
    asked = rpc.ManifestRequest(digest=manifest.digest)
    other = stranger.issue("a")
    with serving(BackboneService(store), "127.0.0.1:0", authority) as address:
        for ca, key, certificate in (
            (authority.certificate, other.key, other.certificate),
            (authority.certificate, None, None),
            (stranger.certificate, site.key, site.certificate),
        ):
            with open_channel(address, ca, key, certificate) as channel:
                call = BackbonesStub(channel).GetManifest
                assert refusal(lambda: call(asked)) == grpc.StatusCode.UNAVAILABLE  # noqa: B023
        with open_channel(address, authority.certificate, site.key, site.certificate) as channel:
            assert BackbonesStub(channel).GetManifest(asked).manifest == manifest.to_json()


@pytest.mark.slow
def test_four_sites_at_once_do_not_make_the_coordinator_hold_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chunks=40)  # 168 MB
    manifest = make_manifest(model, source="m")
    BlobStore(tmp_path / "b").import_folder(model, manifest)
    address = f"unix:{tmp_path}/s"
    command = [sys.executable, backbone_server.__file__, str(tmp_path / "b"), address]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout and server.stdin
    try:
        assert server.stdout.readline() == b"ready\n"
        process = psutil.Process(server.pid)
        request = rpc.ChunksRequest(digest=manifest.digest, indexes=range(len(manifest.chunks)))
        before, most, received = process.memory_info().rss, 0, []

        def read(channel: grpc.Channel) -> None:
            nonlocal most
            count = 0
            for piece in BackbonesStub(channel).GetChunks(request):
                count += len(piece.data)
                most = max(most, process.memory_info().rss)
            received.append(count)

        channels = [open_channel(address, b"", None, None) for _ in range(4)]
        threads = [threading.Thread(target=read, args=(channel,)) for channel in channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for channel in channels:
            channel.close()
    finally:
        server.stdin.close()
        server.wait()
    assert received == [manifest.size] * 4
    assert most - before < 64_000_000
    assert contents(model)
