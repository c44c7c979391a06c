"""A cache of arrays within two budgets of bytes: in memory first, then in files.

Every entry can be computed again. A key is a hash over everything that decides the content. So a
hit equals what computing it would give, and entries serve later rounds and runs. Forked workers
share the files, and each has a memory of its own. An entry larger than a quarter of the memory
budget for arrays is mapped from its file instead.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedgraft.common.encoding import NameParts, digest_of
from fedgraft.common.files import write_atomically

__all__ = ["Arrays", "Files", "Keeper", "Recent", "Store", "open_store"]

ENCODERS = 2  # raise it when a cell becomes other arrays than before
ENCODING = ("fedgraft", "numpy", "pillow", "scipy", "tokenizers", "transformers")
SUFFIX, MAPPED = ".kept.safetensors", ".kept.npy"
ABANDONED = 86400.0  # seconds after which a half-written file is removed
WORTH_A_FILE = 1 << 16  # bytes; a smaller entry is computed again as fast as it is read
LARGEST_SHARE = 4
IN_MEMORY_BYTES = 32 * 2**20
"""Encoded examples larger than this lie in a file, which is paged in batch by batch."""


class Sized(Protocol):
    """An object that knows its size."""

    @property
    def nbytes(self) -> int:
        """The object's size in bytes."""
        ...


V = TypeVar("V", bound=Sized)


class Recent(Generic[V]):
    """The most recently used values, at most ``budget`` bytes of them."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._values: OrderedDict[str, V] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> V | None:
        """Return the value of ``key``, and mark it as used last; None if it is not here."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def add(self, key: str, value: V) -> None:
        """Keep ``value`` in the place of an earlier one, and remove the values used longest ago.

        The newest value stays even if it is too large, because it is about to be used.
        """
        if key in self._values:
            self._bytes -= self._values.pop(key).nbytes
        self._values[key] = value
        self._bytes += value.nbytes
        while self._bytes > self.budget and len(self._values) > 1:
            self._bytes -= self._values.popitem(last=False)[1].nbytes


class Arrays(dict[str, NDArray[Any]]):
    """Named arrays."""

    @property
    def nbytes(self) -> int:
        """The size of all arrays in bytes."""
        return sum(array.nbytes for array in self.values())


class Files:
    """Arrays in a folder, about ``budget`` bytes of them; the oldest are removed first."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._bytes: int | None = None

    def load(self, key: str) -> Arrays | None:
        """Return the arrays saved under ``key``; None if there are none, or none any more."""
        path = self._path(key)
        try:
            arrays = Arrays(load_file(path))
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        return arrays

    def save(self, key: str, arrays: Arrays) -> None:
        """Keep ``arrays`` if they are worth a file and the budget has room for them."""
        if not WORTH_A_FILE <= arrays.nbytes <= self.budget:
            return
        try:
            self._make_room(arrays.nbytes)
            write_atomically(self._path(key), lambda path: save_file(arrays, path))
        except (OSError, SafetensorError):  # a full disk must not lose the result
            return

    def mapped(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        fill: Callable[[NDArray[Any]], None],
    ) -> NDArray[Any] | None:
        """Return one large array that lies in a file and is paged in as it is used.

        ``fill`` computes the array if there is no file. Return None if the array is larger than the
        budget, or the disk is full.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self.budget:
            return None
        path = self.folder / f"{key}{MAPPED}"

        def write(temporary: Path) -> None:
            array = np.lib.format.open_memmap(temporary, "w+", dtype=dtype, shape=shape)
            with temporary.open("r+b") as file:
                # Reserve all pages now: later, a page without room would kill this process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            fill(array)
            array.flush()

        try:
            if (array := _mapped(path, shape)) is None:
                self._make_room(size)
                write_atomically(path, write)
                array = _mapped(path, shape)
        except OSError:
            return None
        return array

    def _make_room(self, size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._bytes is not None:
            self._bytes += size
        if self._bytes is None or self._bytes > self.budget:
            self._bytes = self._tidy(self.budget - size) + size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _tidy(self, most: int) -> int:
        """Remove the oldest files until ``most`` bytes are left; return the bytes left.

        Some more files are removed, so that this is not needed every time. Other processes may do
        the same.
        """
        found: list[tuple[int, int, str]] = []
        for entry in os.scandir(self.folder):
            try:
                facts = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith((SUFFIX, MAPPED)):
                found.append((facts.st_mtime_ns, facts.st_size, entry.path))
            elif entry.name.startswith(".") and facts.st_mtime < time.time() - ABANDONED:
                Path(entry.path).unlink(missing_ok=True)  # its process was killed
        total = sum(size for _, size, _ in found)
        if total <= most:
            return total
        for _, size, path in sorted(found):
            Path(path).unlink(missing_ok=True)
            total -= size
            if total <= most * 9 // 10:
                break
        return total


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Return the array in ``path``; None if there is no file, or no complete one of this shape."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
        os.utime(path)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


class Store:
    """Arrays by key: from memory, else from a file, else computed; and examples, in memory only.

    Arrays and examples have half of the ``memory`` budget each.
    """

    def __init__(self, folder: Path, *, memory: int, disk: int) -> None:
        self.recent: Recent[Arrays] = Recent(memory // 2)
        self.examples: Recent[Sized] = Recent(memory // 2)
        self.files = Files(folder, disk)

    def get(self, key: str, make: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """Return the arrays of ``key``; if there are none yet, compute and keep them."""
        arrays = self.recent.get(key)
        if arrays is not None:
            return arrays
        arrays = self.files.load(key)
        if arrays is None:
            arrays = Arrays(make())
            self.files.save(key, arrays)
        if self.fits(arrays.nbytes):
            self.recent.add(key, arrays)
        return arrays

    def fits(self, size: int) -> bool:
        """Return whether ``size`` bytes are few enough to be held in memory while in use."""
        return size * LARGEST_SHARE <= self.recent.budget


@dataclass(frozen=True)
class Keeper:
    """The cache of encoders (``common.encoding.Keep``), in files of ``store``.

    ``key`` is the backbone's fingerprint, which becomes a part of every name. Without a store,
    nothing is cached.
    """

    store: Store | None
    key: str

    def tokens(self, name: NameParts, make: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """Return named arrays: those that were kept under ``name``, or the result of ``make``."""
        if self.store is None:
            return Arrays(make())
        digest = digest_of(self.key, *_made_by(), *name)
        found = self.store.files.load(digest)
        if found is None:
            found = Arrays(make())
            self.store.files.save(digest, found)
        return found

    def array(
        self,
        shape: tuple[int, ...],
        fill: Callable[[NDArray[Any]], None],
        name: Callable[[], NameParts],
    ) -> NDArray[np.float32]:
        """Return a float32 array that ``fill`` computes; a large one is mapped from a file."""
        if self.store is not None and int(np.prod(shape)) * 4 > IN_MEMORY_BYTES:
            digest = digest_of(self.key, *_made_by(), *name())
            mapped = self.store.files.mapped(digest, shape, np.float32, fill)
            if mapped is not None:
                return mapped
        array = np.empty(shape, np.float32)
        fill(array)
        return array


@lru_cache(maxsize=1)
def _made_by() -> tuple[str, ...]:
    """Return the versions of what turns cells into arrays: others may make other arrays."""
    return (f"encoders {ENCODERS}", *(f"{name} {version(name)}" for name in ENCODING))


@lru_cache(maxsize=4)
def open_store(folder: Path, memory: int, disk: int) -> Store:
    """Return the store of this process in ``folder`` with these budgets in bytes."""
    return Store(folder, memory=memory, disk=disk)
