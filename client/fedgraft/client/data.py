"""A site's rows in the job's schema, and as the tensors that a model eats.

Two steps, so that a mistake is found before anything is computed: ``read_split`` checks every row
and gives a Hugging Face data set of ``text`` or ``image`` and ``label``; ``encode`` tokenises or
decodes it once, for all rounds. A cache folder holds what the texts and images say: it belongs to
the site.
"""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from fedgraft.client.examples import Examples, ImageExamples, Indices, TextExamples
from fedgraft.client.labels import LabelIndex, nearest_label
from fedgraft.client.tables import Table, read_tables
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.job import Job
from fedgraft.common.processors import (
    ImageProcessor,
    Processor,
    TextProcessor,
    open_image,
    to_channels,
)

__all__ = [
    "Examples",
    "ImageExamples",
    "Rows",
    "TextExamples",
    "content_digest",
    "encode",
    "read_split",
    "split_validation",
]

IN_MEMORY_BYTES = 256 * 2**20
"""Pixels beyond this lie in a file of the cache and are paged in batch by batch."""


@dataclass(frozen=True)
class Rows:
    """Rows with ``text`` or ``image``, and ``label``; ``skipped`` bad images were left out."""

    dataset: datasets.Dataset
    skipped: int


def read_split(
    path: str, job: Job, *, columns: Mapping[str, str] = {}, labels: Mapping[str, str] = {}
) -> Rows:
    """Read a CSV, JSONL or Parquet file, a folder of images by label, or a glob of either.

    The data set has ``text`` (string) or ``image`` (``datasets.Image``), and ``label`` (int64 index
    into ``job.job.labels``). ``columns`` maps a column of the job's schema to the site's,
    ``labels`` a value of the site's to the job's name. A label is that name or, where no name
    matches, its index. Nothing is coerced, dropped or filled in; the one exception is a job that
    says ``data.on_bad_image = "skip"``.

    Raises:
        DataError: the first thing that is wrong with the files, and where.
    """
    images = job.job.task == "image-classification"
    schema = job.data.image if images else job.data.text
    _check_mappings(job, schema, columns, labels)
    content, label = columns.get(schema, schema), columns.get(job.data.label, job.data.label)
    tables = read_tables(path, content=content, label=label, images=images)
    named = LabelIndex(job.job.labels, labels)
    targets = [named.of(table, row) for table in tables for row in range(len(table.labels))]
    if not images:
        texts = [_text(table, row) for table in tables for row in range(len(table.contents))]
        return Rows(_dataset("text", texts, targets), skipped=0)
    good = _readable_images(tables, skip=job.data.on_bad_image == "skip")
    contents = [one for table in tables for one in table.contents]
    kept = np.flatnonzero(good)
    if not len(kept):
        raise DataError(f"no image of {path} decodes", hint="are these images at all?")
    dataset = _dataset("image", [contents[i] for i in kept], [targets[i] for i in kept])
    return Rows(dataset, skipped=len(good) - len(kept))


def _dataset(column: str, contents: list[Any], labels: list[int]) -> datasets.Dataset:
    kind = datasets.Image() if column == "image" else datasets.Value("string")
    features = datasets.Features({column: kind, "label": datasets.Value("int64")})
    table = pa.table({column: contents, "label": labels}, schema=features.arrow_schema)
    # from_dict would pickle and hash the table for a fingerprint: most of the time that a small
    # site takes to read. encode hashes the contents itself.
    return datasets.Dataset(
        InMemoryTable(table),
        info=datasets.DatasetInfo(features=features),
        fingerprint=uuid.uuid4().hex,
    )


def _check_mappings(
    job: Job, schema: str, columns: Mapping[str, str], labels: Mapping[str, str]
) -> None:
    for name in columns:
        if name not in (schema, job.data.label):
            raise DataError(
                f"data.columns maps {name!r}, which this job does not ask for",
                hint=f"it asks for {schema!r} and {job.data.label!r}",
            )
    for value, name in labels.items():
        if name not in job.job.labels:
            raise DataError(
                f"data.labels maps {value!r} to {name!r}, which is not a label of the job",
                hint=nearest_label(name, job.job.labels),
            )


def _text(table: Table, row: int) -> str:
    value = table.contents[row]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{table.place(row)} has no text", hint="fill it in or remove the row")
    if not isinstance(value, str):
        raise DataError(
            f"{table.place(row)}: the text is a {type(value).__name__}, not a string",
            hint="write it in quotes, or map the right column in [data.columns] of site.toml",
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise DataError(
            f"{table.place(row)}: the text has a broken character (half a surrogate pair)",
            hint="remove the lone \\ud8xx escape",
        ) from None
    return value


def _readable_images(tables: Sequence[Table], *, skip: bool) -> NDArray[np.bool_]:
    """Which images decode, in threads: PIL lets go of the interpreter. Without ``skip``: all do."""
    places = [(table, row) for table in tables for row in range(len(table.contents))]
    # One task a block, because for small images handing out a task costs more than its work.
    blocks = [places[at : at + 64] for at in range(0, len(places), 64)]
    with ThreadPoolExecutor() as pool:
        found = [problem for block in pool.map(_problems, blocks) for problem in block]
    if not skip and (first := next(filter(None, found), None)):
        raise first
    return np.array([problem is None for problem in found])


def _problems(places: Sequence[tuple[Table, int]]) -> list[DataError | None]:
    """What is wrong with each of these images."""
    found: list[DataError | None] = []
    for table, row in places:
        try:
            if table.contents[row] is None:
                raise DataError("no image", hint="fill it in or remove the row")
            to_channels(open_image(table.contents[row]), 3)  # also what decodes may be unusable
            found.append(None)
        except DataError as error:
            told = f"{table.place(row)}: {error}" if table.numbers else str(error)
            found.append(DataError(told, hint=error.hint))
    return found


def encode(
    dataset: datasets.Dataset, processor: Processor, job: Job, *, cache: Path | None, key: str
) -> Examples:
    """Tokenise or decode all rows of a data set as ``read_split`` gives it.

    Token ids, and pixels beyond ``IN_MEMORY_BYTES``, are kept in the folder ``cache`` under a name
    made of ``key`` (the backbone's fingerprint), the processor, the rows and the job's settings: a
    second call reads them back. Files appear complete or not at all. Without ``cache``: in memory.

    Raises:
        BackboneError: ``data.max_length`` is more than the backbone can read.
        DataError: an image changed since it was read, or a text becomes no tokens.
    """
    labels = np.asarray(dataset.with_format("numpy")["label"][:], dtype=np.int64)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    if isinstance(processor, TextProcessor):
        return _encode_texts(dataset, labels, processor, job.data.max_length, cache, key)
    return _encode_images(dataset, labels, processor, job, cache, key)


def _encode_texts(
    dataset: datasets.Dataset,
    labels: Indices,
    processor: TextProcessor,
    max_length: int,
    cache: Path | None,
    key: str,
) -> TextExamples:
    if processor.limit is not None and max_length > processor.limit:
        raise BackboneError(
            f"data.max_length = {max_length}, but the backbone reads {processor.limit} tokens",
            hint=f"--set data.max_length={processor.limit}",
        )
    digest = _digest(key, processor.identity, max_length, content_digest(dataset))
    tokens = _tokens(dataset, processor, max_length, digest, cache)
    ids, lengths = _flat(tokens, "input_ids")
    if not lengths.all():
        raise DataError(
            f"text {int(np.argmin(lengths)) + 1} of {len(labels)} becomes no tokens at all",
            hint="remove the row: the tokenizer knows none of its characters",
        )
    typed = "token_type_ids" in tokens.column_names
    return TextExamples(
        labels=labels,
        ids=ids,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=_flat(tokens, "token_type_ids")[0] if typed else None,
        pad_id=processor.pad_id,
        pad_left=processor.pad_left,
    )


def _tokens(
    dataset: datasets.Dataset,
    processor: TextProcessor,
    max_length: int,
    digest: str,
    cache: Path | None,
) -> datasets.Dataset:
    """The lists of ids (and token types), from the cache if it has them."""
    path = None if cache is None else cache / f"tokens-{digest}.arrow"
    if path is not None and path.exists():
        return datasets.Dataset.from_file(str(path))
    kinds = {"input_ids": "int32", "token_type_ids": "int8"}
    given = processor.tokenize(["a"], max_length)
    kept = {name: datasets.List(datasets.Value(kinds[name])) for name in kinds if name in given}
    if not len(dataset):  # map would leave it as it is, without the new columns
        empty: dict[str, list[Any]] = {name: [] for name in kept}
        return datasets.Dataset.from_dict(empty, features=datasets.Features(kept))

    def tokenise(texts: list[str]) -> dict[str, Any]:
        encoded = processor.tokenize(texts, max_length)
        return {name: encoded[name] for name in kept}

    with _no_progress():
        return dataset.select_columns(["text"]).map(
            tokenise,
            batched=True,
            input_columns=["text"],
            remove_columns=["text"],
            features=datasets.Features(kept),
            keep_in_memory=path is None,
            cache_file_name=None if path is None else str(path),
            new_fingerprint=digest,
        )


def _flat(tokens: datasets.Dataset, name: str) -> tuple[NDArray[Any], Indices]:
    """A column of lists as one array, and the length of each list."""
    column = tokens.with_format("arrow")[:].column(name).combine_chunks()
    values = np.array(column.flatten().to_numpy())  # a copy: the cache file may then go away
    return values, column.value_lengths().to_numpy().astype(np.int64)


@contextmanager
def _no_progress() -> Iterator[None]:
    """Keep the bars of ``datasets`` off the terminal, which belongs to the console."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _encode_images(
    dataset: datasets.Dataset,
    labels: Indices,
    processor: ImageProcessor,
    job: Job,
    cache: Path | None,
    key: str,
) -> ImageExamples:
    shape = (len(labels), processor.channels, *processor.size)
    normalize = job.data.normalize
    every = np.arange(len(labels), dtype=np.int64)

    def fill(pixels: NDArray[np.float32]) -> None:
        rows = dataset.cast_column("image", datasets.Image(decode=False))
        at = 0
        for batch in rows.select_columns(["image"]).iter(batch_size=32):
            images = [open_image(source) for source in batch["image"]]
            pixels[at : at + len(images)] = processor.pixels(images, normalize)
            at += len(images)

    if cache is None or int(np.prod(shape)) * 4 < IN_MEMORY_BYTES:
        pixels = np.empty(shape, dtype=np.float32)
        fill(pixels)
        return ImageExamples(labels, pixels, every)
    digest = _digest(key, processor.identity, normalize, content_digest(dataset))
    path = cache / f"pixels-{digest}.npy"
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix=".pixels-", dir=cache) as partial:
            target = Path(partial, "pixels.npy")
            mapped = np.lib.format.open_memmap(target, "w+", dtype=np.float32, shape=shape)
            fill(mapped)
            mapped.flush()
            os.replace(target, path)
    return ImageExamples(labels, np.load(path, mmap_mode="r"), every)


def content_digest(dataset: datasets.Dataset) -> str:
    """SHA-256 of all texts or image bytes of a data set, in order: its labels do not count."""
    column = "text" if "text" in dataset.column_names else "image"
    if column == "image":
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    digest = hashlib.sha256()
    for batch in dataset.select_columns([column]).iter(batch_size=256):
        for value in batch[column]:
            data = value.encode() if isinstance(value, str) else _image_bytes(value)
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _image_bytes(source: Mapping[str, Any]) -> bytes:
    data = source["bytes"]
    return bytes(data) if data is not None else Path(source["path"]).read_bytes()


def _digest(*parts: str | int) -> str:
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:32]


def split_validation(
    labels: NDArray[np.int64], share: float, generator: np.random.Generator
) -> tuple[Indices, Indices]:
    """Split the indices of ``labels`` [n] into (train, validation), each sorted, int64.

    Validation has about ``share`` of all examples and of every class (largest remainders, ties by
    lot), but every class keeps at least one training example, so a tiny set may have none.
    """
    classes, of_class = np.unique(labels, return_inverse=True)
    counts = np.bincount(of_class, minlength=len(classes))
    wanted = counts * share
    taken = np.minimum(np.floor(wanted).astype(np.int64), np.maximum(counts - 1, 0))
    missing = round(len(labels) * share) - int(taken.sum())
    lot = generator.permutation(len(classes))
    by_remainder = lot[np.argsort(-(wanted - np.floor(wanted))[lot], kind="stable")]
    able = [c for c in by_remainder if taken[c] < counts[c] - 1 and wanted[c] > taken[c]]
    taken[able[: max(0, missing)]] += 1
    chosen = [
        generator.permutation(np.flatnonzero(of_class == c))[: taken[c]]
        for c in range(len(classes))
    ]
    validation = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *chosen])).astype(np.int64)
    train = np.setdiff1d(np.arange(len(labels), dtype=np.int64), validation)
    return train, validation
