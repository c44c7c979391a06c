"""Fetch a backbone from the coordinator: the missing chunks, verified, in one stream.

The content from the coordinator is not trusted: the manifest must have the digest that was asked
for, and a chunk counts only if its bytes on disk have its hash. Pieces are written as they arrive,
and other threads hash them meanwhile. So only the current piece is kept in memory.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc

from fedgraft.common.backbones.blob_store import BlobStore, Receiver
from fedgraft.common.backbones.manifest import Manifest, Progress
from fedgraft.common.errors import BackboneError, MessageError, TransferError
from fedgraft.common.rpc import fedgraft_v1_pb2 as rpc
from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import BackbonesStub

__all__ = ["fetch_backbone"]

HASHING = 2  # threads; each is faster than a stream of Python's gRPC
UNHASHED = 4  # the most chunks that are received and not yet hashed
TRIES_OF_A_CHUNK = 3
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds, while no new chunk arrives
ANSWER = 60.0  # seconds that a manifest may take
# Status codes when a coordinator starts again, the proxy before it reloads, or a line breaks.
PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,  # a stream that was reset
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
REASONS = {
    grpc.StatusCode.NOT_FOUND: ("has no such backbone", "let it import the backbone again"),
    grpc.StatusCode.DATA_LOSS: ("has a damaged copy", "let it import the backbone again"),
    grpc.StatusCode.UNAUTHENTICATED: ("does not know this site", "fedgraft site doctor"),
    grpc.StatusCode.PERMISSION_DENIED: ("refuses this site", "fedgraft site doctor"),
}


def fetch_backbone(
    channel: grpc.Channel,
    digest: str,
    store: BlobStore,
    *,
    progress: Progress | None = None,
    allowed: Callable[[Manifest], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Return the folder of the backbone ``digest`` in ``store``; fetch missing parts first.

    ``allowed`` gets the manifest before anything is written, and raises to refuse it. ``progress``
    gets the number of bytes that are here and verified, and the number of all bytes.

    Raises:
        BackboneError: the coordinator's manifest is not valid, or not that of ``digest``.
        TransferError: the coordinator does not answer or has no such backbone, chunks arrive
            damaged again and again, or the disk has no room. Received chunks are kept.
        MessageError: the coordinator sent data that were not asked for.
        RunError: another process fetches into this store.
    """
    stub = BackbonesStub(channel)
    backoff = _Backoff(sleep)
    manifest = _known(store, digest) or _ask_manifest(stub, digest, backoff)
    if allowed is not None:
        allowed(manifest)
    with store.receive(manifest) as receiver, ThreadPoolExecutor(HASHING) as hashers:
        arrival = _Arrival(receiver, hashers, progress)
        while wanted := receiver.missing:
            try:
                arrival.take(stub, wanted)
            except grpc.RpcError as error:
                backoff.wait_after(error, came=arrival.came())
    return store.folder(digest)


class _Backoff:
    """The waits after failures of a line: longer each time, and short again after progress."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._waits = iter(WAITS)

    def wait_after(self, error: grpc.RpcError, *, came: bool = False) -> None:
        """Wait before the next try, or raise a TransferError if another try would not help."""
        code = error.code()
        if came:
            self._waits = iter(WAITS)
        wait = next(self._waits, None) if code in PASSING else None
        if wait is None:
            what, hint = REASONS.get(code, ("does not answer", "is it up? fedgraft site doctor"))
            raise TransferError(f"the coordinator {what} ({code.name})", hint=hint) from None
        self._sleep(wait)


class _Arrival:
    """The chunks from one or several streams, with a count of damaged arrivals of each."""

    def __init__(
        self, receiver: Receiver, hashers: ThreadPoolExecutor, progress: Progress | None
    ) -> None:
        self._receiver, self._hashers, self._progress = receiver, hashers, progress
        self._damaged: Counter[int] = Counter()
        self._had = receiver.done

    def came(self) -> bool:
        """Return whether anything was verified since the last call."""
        had, self._had = self._had, self._receiver.done
        return self._had > had

    def take(self, stub: BackbonesStub, wanted: Sequence[int]) -> None:
        """Ask for the chunks ``wanted``, write them as they arrive, and count the good ones."""
        hashing: deque[tuple[int, Future[bool]]] = deque()
        stream = stub.GetChunks(
            rpc.ChunksRequest(digest=self._receiver.manifest.digest, indexes=wanted)
        )
        try:
            for index in wanted:
                self._write(stream, index)
                hashing.append((index, self._hashers.submit(self._receiver.confirm, index)))
                if len(hashing) > UNHASHED:
                    self._count(*hashing.popleft())
        finally:
            stream.cancel()
            while hashing:
                self._count(*hashing.popleft())

    def _write(self, stream: Iterator[rpc.Chunk], index: int) -> None:
        offset = 0
        for piece in stream:
            data = piece.data  # each access makes a copy
            if piece.index != index or not data:
                raise MessageError(f"chunk {index} was expected")
            self._receiver.write(index, offset, data)
            offset += len(data)
            if piece.last:
                return
        raise MessageError(f"the coordinator ended before chunk {index}")

    def _count(self, index: int, hashing: Future[bool]) -> None:
        if hashing.result():
            if self._progress is not None:
                self._progress(self._receiver.done, self._receiver.manifest.size)
            return
        self._damaged[index] += 1
        if self._damaged[index] == TRIES_OF_A_CHUNK:
            chunk = self._receiver.manifest.chunks[index]
            raise TransferError(
                f"bytes {chunk.offset:,} to {chunk.offset + chunk.length:,} of {chunk.file.name} "
                f"arrived damaged {TRIES_OF_A_CHUNK} times",
                hint="the coordinator's copy is damaged: let it import the backbone again",
            )


def _known(store: BlobStore, digest: str) -> Manifest | None:
    """Return the manifest if it is here: a complete backbone then needs no coordinator."""
    try:
        return store.manifest(digest)
    except BackboneError:
        return None


def _ask_manifest(stub: BackbonesStub, digest: str, backoff: _Backoff) -> Manifest:
    while True:
        try:
            reply = stub.GetManifest(rpc.ManifestRequest(digest=digest), timeout=ANSWER)
        except grpc.RpcError as error:
            backoff.wait_after(error)
            continue
        manifest = Manifest.from_json(reply.manifest)
        if manifest.digest != digest:
            raise BackboneError(
                f"the coordinator's manifest is of {manifest.digest[:12]}, not of {digest[:12]}",
                hint="ask whoever runs the coordinator: nothing was stored",
            )
        return manifest
