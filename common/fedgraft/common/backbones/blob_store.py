"""Backbones on disk: content-addressed, verified chunk by chunk, and either complete or absent.

    manifests/DIGEST.json    written last: a backbone with a manifest was complete once
    models/DIGEST/NAME       the files that transformers reads: hard links to
    files/CONTENT            whole files, so that backbones share equal files
    partial/CONTENT          incomplete files, at their full size, with holes

A chunk is complete if the bytes in its place have its hash. No other state is stored: after a crash
the next process hashes the bytes on disk. So bytes may be written before they are verified. A
killed process loses at most the chunk that it was receiving, and two processes that write one file
write the same bytes. Damage found later is treated in the same way: the file goes back to
``partial``, and the next fetch repairs the wrong chunks.
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedgraft.common.backbones.manifest import (
    DIGEST,
    HASHERS,
    Chunk,
    Manifest,
    ManifestFile,
    Progress,
    hash_chunk,
    make_manifest,
)
from fedgraft.common.errors import BackboneError, MessageError, TransferError
from fedgraft.common.files import lock_folder, sync_folder, write_atomically

__all__ = ["BlobStore", "Manifest", "Receiver", "make_manifest", "open_store", "set_store"]

RESERVE = 268_435_456  # bytes that stay free on the disk for runs, audit and logs
PLACE = "FEDGRAFT_BACKBONES"


class BlobStore:
    """The backbones in the folder ``root``; it is created (mode 0700) if it does not exist.

    Raises:
        TransferError: it cannot be created.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("manifests", "models", "files", "partial"):
                (root / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise _not_stored(error, root) from None

    def manifest(self, digest: str) -> Manifest:
        """Return the manifest of a backbone that is or was complete here.

        Raises:
            BackboneError: there is none, or its file is damaged.
        """
        path = self._manifest_path(digest)
        if not re.fullmatch(DIGEST, digest) or not path.exists():  # it may come from the network
            raise BackboneError(
                f"no backbone {digest[:12]} in {self.root}", hint="fedgraft fetch PATH brings it"
            )
        manifest = Manifest.from_json(path.read_bytes())
        if manifest.digest != digest:
            raise BackboneError(f"the manifest {digest[:12]} is damaged", hint="fetch it again")
        return manifest

    def complete(self, manifest: Manifest) -> bool:
        """Return whether every file is present; only ``check`` finds changed bytes."""
        return self._manifest_path(manifest.digest).exists() and all(
            self._has(file) for file in manifest.files
        )

    def missing(self, manifest: Manifest) -> tuple[int, ...]:
        """Return the indices of the missing chunks; incomplete files are hashed."""
        coming = {file.content: file for file in manifest.files if not self._has(file)}
        wanted = {
            file.name: self._unverified(self._partial(file), file) for file in coming.values()
        }  # one entry for files with equal content
        return tuple(
            index
            for index, chunk in enumerate(manifest.chunks)
            if chunk.offset in wanted.get(chunk.file.name, ())
        )

    def check(self, manifest: Manifest) -> None:
        """Hash every present file again; a changed file goes back to ``partial``.

        Raises:
            BackboneError: a file has changed. Receiving the manifest again repairs it.
        """
        if damaged := self._put_back_damaged(manifest):
            raise BackboneError(
                f"{', '.join(damaged)} of the backbone {manifest.digest[:12]} changed on disk",
                hint="fetch it again: only the chunks that are wrong are transferred",
            )

    def folder(self, digest: str) -> Path:
        """Return the folder with a backbone's files for transformers.

        Raises:
            BackboneError: it is not complete, or another file is in its folder.
        """
        manifest = self.manifest(digest)
        folder = self._model(digest)
        if not self.complete(manifest) or not _holds(folder, manifest, self):
            raise BackboneError(f"the backbone {digest[:12]} is damaged", hint="fetch it again")
        return folder

    def file_path(self, file: ManifestFile) -> Path:
        """Return the path of a whole file; the file need not exist."""
        return self.root / "files" / file.content

    @contextmanager
    def receive(self, manifest: Manifest) -> Iterator["Receiver"]:
        """Receive the missing chunks of a backbone; it is available once no chunk is missing.

        Raises:
            RunError: another process receives into this store.
            TransferError: not enough space on the disk; nothing was written.
        """
        with lock_folder(self.root):
            for file in manifest.files:  # another size: damaged
                if self.file_path(file).exists() and not self._has(file):
                    self._put_back(file)
            missing = self.missing(manifest)
            self._require_room(sum(manifest.chunks[index].length for index in missing))
            with Receiver(self, manifest, missing) as receiver:
                yield receiver
            if not receiver.missing:
                self._commit(manifest)

    def import_folder(
        self, folder: Path, manifest: Manifest, *, progress: Progress | None = None
    ) -> Path:
        """Copy missing or damaged chunks from a local folder, verified; return the store's folder.

        Raises:
            BackboneError: a file is missing there, or differs from the manifest.
            RunError: another process receives into this store.
            TransferError: the disk is full.
        """
        self._put_back_damaged(manifest)
        with self.receive(manifest) as receiver, ThreadPoolExecutor(HASHERS) as copiers:

            def copy(index: int) -> None:
                chunk = manifest.chunks[index]
                with (folder / chunk.file.name).open("rb") as file:
                    receiver.write(index, 0, os.pread(file.fileno(), chunk.length, chunk.offset))
                if not receiver.confirm(index):
                    raise BackboneError(
                        f"{chunk.file.name} in {folder} is not what the manifest says",
                        hint="copy the model again, or make its manifest again",
                    )

            try:
                for _ in copiers.map(copy, receiver.missing):
                    if progress:
                        progress(receiver.done, manifest.size)
            except OSError as error:
                name = Path(str(error.filename)).name
                raise BackboneError(
                    f"no {name} in {folder} that can be read", hint="copy the model again"
                ) from None
            finally:
                copiers.shutdown(cancel_futures=True)
        return self.folder(manifest.digest)

    def _manifest_path(self, digest: str) -> Path:
        return self.root / "manifests" / f"{digest}.json"

    def _model(self, digest: str) -> Path:
        return self.root / "models" / digest

    def _partial(self, file: ManifestFile) -> Path:
        return self.root / "partial" / file.content

    def _has(self, file: ManifestFile) -> bool:
        try:
            return self.file_path(file).stat().st_size == file.size
        except FileNotFoundError:
            return False

    def _put_back_damaged(self, manifest: Manifest) -> list[str]:
        damaged = []
        for file in manifest.files:
            path = self.file_path(file)
            if path.exists() and (not self._has(file) or self._unverified(path, file)):
                self._put_back(file)
                damaged.append(file.name)
        return damaged

    def _put_back(self, file: ManifestFile) -> None:
        self.file_path(file).chmod(0o600)
        self.file_path(file).replace(self._partial(file))

    def _unverified(self, path: Path, file: ManifestFile) -> set[int]:
        """Return the offsets of the chunks of ``file`` that ``path`` does not contain."""
        if not path.exists():
            return {chunk.offset for chunk in file.split()}
        with path.open("rb") as opened, ThreadPoolExecutor(HASHERS) as hashers:
            descriptor = opened.fileno()
            good = hashers.map(lambda chunk: _holds_chunk(descriptor, chunk), file.split())
            return {
                chunk.offset for chunk, held in zip(file.split(), good, strict=True) if not held
            }

    def _require_room(self, wanted: int) -> None:
        free = shutil.disk_usage(self.root).free
        if wanted and free < wanted + RESERVE:
            raise TransferError(
                f"{self.root} has {free / 1e9:.1f} GB free, and the backbone takes "
                f"{wanted / 1e9:.1f} GB more and leaves {RESERVE / 1e9:.1f} GB",
                hint="make room, or let the state folder lie on a larger disk",
            )

    def _commit(self, manifest: Manifest) -> None:
        """Write links first and the manifest last: after a crash between, nothing counts."""
        folder = self._model(manifest.digest)
        folder.mkdir(exist_ok=True, mode=0o700)
        for stranger in {path.name for path in folder.iterdir()} - _names(manifest):
            (folder / stranger).unlink()
        for file in manifest.files:
            place, whole = folder / file.name, self.file_path(file)
            if not (place.exists() and place.samefile(whole)):
                place.unlink(missing_ok=True)
                os.link(whole, place)
        sync_folder(folder)
        content = manifest.to_json()
        write_atomically(
            self._manifest_path(manifest.digest), lambda path: path.write_bytes(content)
        )


class Receiver:
    """A receiver of one backbone, made by ``BlobStore.receive``; threads may share it.

    ``missing`` are the chunks not yet confirmed; ``done`` is the number of verified bytes.
    """

    def __init__(self, store: BlobStore, manifest: Manifest, missing: tuple[int, ...]) -> None:
        self.manifest = manifest
        self._store = store
        self._open: dict[str, int] = {}
        self._left: dict[str, set[int]] = {
            file.content: set() for file in manifest.files if not store._has(file)
        }
        for index in missing:
            self._left[manifest.chunks[index].file.content].add(index)
        self._done = manifest.size - sum(manifest.chunks[index].length for index in missing)
        self._lock = threading.Lock()
        self._closing = ExitStack()

    def __enter__(self) -> "Receiver":
        files = {file.content: file for file in self.manifest.files}
        with self._closing:
            for content in list(self._left):
                self._start(files[content])
            self._closing = self._closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def missing(self) -> tuple[int, ...]:
        """Return the indices of the chunks that are still missing, in order."""
        with self._lock:
            return tuple(sorted(index for left in self._left.values() for index in left))

    @property
    def done(self) -> int:
        """Return the number of bytes that are present and verified."""
        return self._done

    def write(self, index: int, offset: int, piece: bytes | memoryview) -> None:
        """Write ``piece`` at ``offset`` of a missing chunk; only ``confirm`` makes it count.

        Raises:
            MessageError: the piece would go beyond the end of the chunk.
            TransferError: the disk does not accept it.
        """
        chunk = self.manifest.chunks[index]
        if offset + len(piece) > chunk.length:
            raise MessageError(f"more bytes than chunk {index} has")
        try:
            _write_all(self._open[chunk.file.content], piece, chunk.offset + offset)
        except OSError as error:
            raise _not_stored(error, self._store.root) from None

    def confirm(self, index: int) -> bool:
        """Hash the bytes in the chunk's place; the last chunk of a file completes the file.

        Raises:
            TransferError: the disk does not accept it.
        """
        chunk = self.manifest.chunks[index]
        content = chunk.file.content
        if hash_chunk(self._open[content], chunk.offset, chunk.length) != chunk.digest:
            return False
        with self._lock:
            self._left[content].remove(index)
            self._done += chunk.length
            whole = not self._left[content]
        if whole:
            self._finish(chunk.file)
        return True

    def _start(self, file: ManifestFile) -> None:
        path = self._store._partial(file)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._closing.callback(os.close, descriptor)
            os.ftruncate(descriptor, file.size)
        except OSError as error:
            raise _not_stored(error, self._store.root) from None
        self._open[file.content] = descriptor
        if not self._left[file.content]:  # killed just before the rename, or empty
            self._finish(file)

    def _finish(self, file: ManifestFile) -> None:
        try:
            os.fsync(self._open[file.content])
            os.fchmod(self._open[file.content], 0o400)
            self._store._partial(file).replace(self._store.file_path(file))
            sync_folder(self._store.root / "files")
        except FileNotFoundError:
            if not self._store._has(file):  # else another thread completed the same file
                raise BackboneError(
                    f"{self._store.root} was changed meanwhile", hint="fetch again"
                ) from None
        except OSError as error:
            raise _not_stored(error, self._store.root) from None


def set_store(root: Path) -> None:
    """Set the store of ``manifest:`` backbones for this process and for its child processes."""
    os.environ[PLACE] = str(root)


def open_store() -> BlobStore:
    """Return the store of this process, from ``set_store`` or ``FEDGRAFT_BACKBONES``.

    Raises:
        BackboneError: neither is set.
    """
    root = os.environ.get(PLACE)
    if not root:
        raise BackboneError(
            "no store of backbones here to look for manifest:... in",
            hint=f"set {PLACE} to a site's or a coordinator's folder `backbones`",
        )
    return BlobStore(Path(root))


def _names(manifest: Manifest) -> set[str]:
    return {file.name for file in manifest.files}


def _holds(folder: Path, manifest: Manifest, store: BlobStore) -> bool:
    """Return whether ``folder`` has exactly the manifest's files, linked to the store."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != _names(manifest):
        return False
    return all((folder / file.name).samefile(store.file_path(file)) for file in manifest.files)


def _holds_chunk(descriptor: int, chunk: Chunk) -> bool:
    try:  # a hole needs no hashing
        if os.lseek(descriptor, chunk.offset, os.SEEK_DATA) >= chunk.offset + chunk.length:
            return False
    except OSError:  # only a hole from here on, or the file is shorter
        return False
    return hash_chunk(descriptor, chunk.offset, chunk.length) == chunk.digest


def _write_all(descriptor: int, piece: bytes | memoryview, offset: int) -> None:
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _not_stored(error: OSError, root: Path) -> TransferError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return TransferError(
        f"{root}: {'the disk is full' if full else error.strerror}",
        hint="make room and fetch again: what has come is kept" if full else "check the disk",
    )
