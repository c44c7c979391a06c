"""The content of a backbone: its files in chunks, with the SHA-256 of each chunk.

With the digest of a manifest the backbone can be taken from any sender: the manifest is checked
against the digest, and every chunk against the manifest. The digest covers only names and contents,
so two copies of a model have one digest, independent of their source. Licence and source are
statements of the sender. The files are those that ``folder.fingerprint`` covers.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePath
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedgraft.common.backbones.folder import FINGERPRINTED, PICKLES, model_files, refuse_unsafe
from fedgraft.common.errors import BackboneError
from fedgraft.common.section import Section

__all__ = [
    "CHUNK",
    "DIGEST",
    "LIMIT",
    "Chunk",
    "Manifest",
    "ManifestFile",
    "Progress",
    "hash_chunk",
    "licence_of",
    "make_manifest",
]

CHUNK: Final = 4_194_304  # bytes: 4 MiB; only the last chunk of a file is shorter
LIMIT = 8_000_000  # bytes of a manifest as JSON: about 500 GB of backbone
DIGEST = r"^[0-9a-f]{64}$"
HASHERS = min(8, os.cpu_count() or 1)
AGAIN = "ask whoever runs the coordinator: this does not come from fedgraft"

Progress = Callable[[int, int], None]  # bytes done, total bytes


def _is_safe(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", name):
        raise ValueError("is no plain file name")  # a path, a hidden file, or worse
    suffix = PurePath(name).suffix
    if suffix in PICKLES:
        raise ValueError("is in a format that can run code")
    if suffix not in FINGERPRINTED:
        raise ValueError(f"is none of {', '.join(FINGERPRINTED)}")
    return name


def _is_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has characters that cannot be shown")
    return text


Digest = Annotated[str, Field(pattern=DIGEST)]
FileName = Annotated[str, AfterValidator(_is_safe)]
Label = Annotated[str, Field(max_length=200), AfterValidator(_is_printable)]


class Chunk(NamedTuple):
    """``length`` bytes at ``offset`` of ``file``, with their SHA-256 (hex)."""

    file: "ManifestFile"
    offset: int
    length: int
    digest: str


class ManifestFile(Section):
    """One file: its name, its number of bytes, and the SHA-256 (hex) of each chunk."""

    name: FileName
    size: int = Field(ge=0, strict=True)
    chunks: tuple[Digest, ...]

    @model_validator(mode="after")
    def _chunks_fit_size(self) -> Self:
        if len(self.chunks) != -(-self.size // CHUNK):
            raise ValueError(f"{self.name}: size and number of chunks do not fit")
        return self

    @cached_property
    def content(self) -> str:
        """Return the SHA-256 (hex) over size and chunks: equal for equal bytes under any name."""
        return hashlib.sha256(_canonical([self.size, self.chunks])).hexdigest()

    def split(self) -> Iterator[Chunk]:
        """Yield the file's chunks, in order."""
        for place, digest in enumerate(self.chunks):
            offset = place * CHUNK
            yield Chunk(self, offset, min(CHUNK, self.size - offset), digest)


class Manifest(Section):
    """A backbone's files, sorted by name, and the sender's statements on licence and source."""

    format: Literal["fedgraft-backbone/1"] = "fedgraft-backbone/1"
    chunk_bytes: Literal[4_194_304] = CHUNK
    files: tuple[ManifestFile, ...] = Field(min_length=1)
    licence: Label = ""
    source: Label = ""

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        names = [file.name for file in self.files]
        if names != sorted(names) or len({name.lower() for name in names}) < len(names):
            raise ValueError("file names must be sorted, and differ in more than case")
        if "config.json" not in names or "adapter_config.json" in names:
            raise ValueError("these are not the files of a model")
        return self

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Return every chunk of every file, in order; a chunk's index is its position here."""
        return tuple(chunk for file in self.files for chunk in file.split())

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON without licence and source."""
        content = self.model_dump(mode="json", exclude={"licence", "source"})
        return hashlib.sha256(_canonical(content)).hexdigest()

    @cached_property
    def size(self) -> int:
        """Return the number of bytes of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> bytes:
        """Return canonical JSON, which ``from_json`` reads."""
        return _canonical(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Return the manifest that ``to_json`` wrote; only canonical JSON is accepted.

        Raises:
            BackboneError: not a manifest, or a manifest with files that no model needs.
        """
        if len(data) > LIMIT:
            raise BackboneError(f"a manifest of more than {LIMIT:,} bytes", hint=AGAIN)
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise BackboneError(f"no manifest: {_first_problem(error)}", hint=AGAIN) from None
        if manifest.to_json() != data:  # a repeated key, other spelling, other order
            raise BackboneError("no manifest: its JSON is not canonical", hint=AGAIN)
        return manifest


def make_manifest(folder: Path, *, source: str, progress: Progress | None = None) -> Manifest:
    """Return the manifest of the model in ``folder``; every byte is read once, chunk by chunk.

    Raises:
        BackboneError: it cannot be read, or cannot be loaded as a model (``refuse_unsafe``).
    """
    refuse_unsafe(folder, source, "random")  # a config alone is enough for random weights
    files, done = [], 0
    try:
        paths = model_files(folder)
        sizes = [path.stat().st_size for path in paths]
        total = sum(sizes)
        with ThreadPoolExecutor(HASHERS) as hashers:
            for path, size in zip(paths, sizes, strict=True):
                hashes = []
                for digest in _hash_file(hashers, path, size):
                    hashes.append(digest)
                    done += min(CHUNK, total - done)
                    if progress:
                        progress(done, total)
                files.append(ManifestFile(name=path.name, size=size, chunks=tuple(hashes)))
        manifest = Manifest(files=tuple(files), licence=licence_of(folder), source=source)
    except ValidationError as error:
        raise BackboneError(
            f"{source}: {_first_problem(error)}", hint="rename that file, or take it out"
        ) from None
    except OSError as error:
        raise BackboneError(
            f"{source} cannot be read: {error.strerror}", hint="check the folder and its files"
        ) from None
    if len(manifest.to_json()) > LIMIT:
        raise BackboneError(f"{source} is too large to hand out", hint="take a smaller backbone")
    return manifest


def hash_chunk(file: int, offset: int, length: int) -> str:
    """Return the SHA-256 (hex) of ``length`` bytes at ``offset`` of an open file.

    If the file is shorter, only the existing bytes are hashed.
    """
    return hashlib.sha256(os.pread(file, length, offset)).hexdigest()


def _hash_file(hashers: ThreadPoolExecutor, path: Path, size: int) -> Iterable[str]:
    with path.open("rb") as file:
        descriptor = file.fileno()
        yield from hashers.map(
            lambda offset: hash_chunk(descriptor, offset, CHUNK), range(0, size, CHUNK)
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def licence_of(folder: Path) -> str:
    """Return the licence in the model card, else the first line of a licence file, else ""."""
    card = _first_lines(folder / "README.md")
    if found := re.match(r"---\n(?:.*\n)*?license:[ \t]*([^\n]+)", card):
        return _shown(found[1].strip("'\" "))
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt"):
        if text := _first_lines(folder / name).strip():
            return _shown(text.splitlines()[0].strip("# "))
    return ""


def _first_lines(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(4096).decode("utf-8", errors="replace")


def _shown(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())[:200]
