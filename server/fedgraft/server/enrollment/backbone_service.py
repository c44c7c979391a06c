"""gRPC service that sends backbones to sites, chunk by chunk from the coordinator's store.

Files are read one piece at a time, so that memory does not depend on the model's size; a stream
holds at most two pieces. nginx in front of this service checks the client certificate.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import grpc

from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.backbones.manifest import Chunk, Manifest
from fedgraft.common.errors import BackboneError
from fedgraft.common.rpc import fedgraft_v1_pb2 as rpc
from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import BackbonesServicer

__all__ = ["BackboneService"]

PIECE = 1_048_576  # bytes in a message


class BackboneService(BackbonesServicer):
    """Serves every backbone that is complete in ``store``."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def GetManifest(
        self, request: rpc.ManifestRequest, context: grpc.ServicerContext
    ) -> rpc.ManifestReply:
        """Return the manifest with the requested digest; NOT_FOUND if there is none."""
        return rpc.ManifestReply(manifest=self._find(request.digest, context).to_json())

    def GetChunks(
        self, request: rpc.ChunksRequest, context: grpc.ServicerContext
    ) -> Iterator[rpc.Chunk]:
        """Yield the requested chunks, in the order of the request, each in pieces.

        The error is NOT_FOUND for an unknown digest, INVALID_ARGUMENT for an index that does not
        exist or comes twice, and DATA_LOSS if a file of the backbone is missing or too short.
        """
        manifest = self._find(request.digest, context)
        indexes = request.indexes
        if len(set(indexes)) < len(indexes) or max(indexes, default=0) >= len(manifest.chunks):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "indexes of the manifest, each once")
        try:
            yield from _read(self._store, manifest, indexes)
        except OSError:
            context.abort(grpc.StatusCode.DATA_LOSS, "a file of this backbone is damaged")

    def _find(self, digest: str, context: grpc.ServicerContext) -> Manifest:
        try:
            return self._store.manifest(digest)
        except BackboneError:
            context.abort(grpc.StatusCode.NOT_FOUND, "no backbone with this digest")
            raise


def _read(store: BlobStore, manifest: Manifest, indexes: Sequence[int]) -> Iterator[rpc.Chunk]:
    """Yield the pieces of the chunks; only one file is open at a time.

    Raises:
        OSError: a file is missing, or has become shorter.
    """
    with ExitStack() as opened:
        current, descriptor = None, -1
        for index in indexes:
            chunk = manifest.chunks[index]
            if chunk.file is not current:
                opened.close()
                file = opened.enter_context(store.file_path(chunk.file).open("rb", buffering=0))
                current, descriptor = chunk.file, file.fileno()
            yield from _pieces(descriptor, index, chunk)


def _pieces(descriptor: int, index: int, chunk: Chunk) -> Iterator[rpc.Chunk]:
    for offset in range(0, chunk.length, PIECE):
        length = min(PIECE, chunk.length - offset)
        data = os.pread(descriptor, length, chunk.offset + offset)
        if len(data) < length:
            raise OSError("the file became shorter")
        yield rpc.Chunk(index=index, data=data, last=offset + length == chunk.length)
