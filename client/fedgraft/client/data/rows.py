"""A site's rows in the job's schema, and as the tensors that a model eats.

Two steps, so that a mistake is found before anything is computed: ``read_split`` checks every row
and gives a Hugging Face data set of ``text``, ``image``... and ``label``; ``encode``
tokenises or decodes it once, for all rounds. A cache folder holds what the rows say: it belongs to
the site.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store, filled_array
from fedgraft.client.data.files import Table, read_tables
from fedgraft.client.data.groups import read_groups
from fedgraft.client.data.labels import LabelIndex, nearest_label
from fedgraft.client.objectives.labels import IGNORED
from fedgraft.common.config.job import Job
from fedgraft.common.errors import DataError
from fedgraft.common.examples import AudioExamples, Examples, ImageExamples, Indices, TextExamples
from fedgraft.common.modalities import (
    ImageProcessor,
    Processor,
    TextProcessor,
    open_image,
    to_channels,
)
from fedgraft.common.modalities.audio import AudioProcessor, open_recording
from fedgraft.common.modalities.audio_arrays import encode_recordings
from fedgraft.common.modalities.text_arrays import (
    check_length,
    digest_of,
    encode_texts,
    texts_digest,
)
from fedgraft.common.modalities.video import VideoProcessor, open_clip
from fedgraft.common.modalities.video_arrays import encode_clips
from fedgraft.common.tasks import TASKS, Modality
from fedgraft.common.tasks.causal_lm import encode_blocks
from fedgraft.common.tasks.masked_image_modeling import hide_patches
from fedgraft.common.tasks.masked_lm import encode_cloze
from fedgraft.common.tasks.seq2seq_lm import encode_pairs

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


@dataclass(frozen=True)
class Rows:
    """Rows with ``text``, ``image`` or ``audio``, and ``label``; ``skipped`` bad ones are out.

    Where tokens are predicted every label is 0; of a paired task there is a ``target`` beside it.
    """

    dataset: datasets.Dataset
    skipped: int


def read_split(
    path: str,
    job: Job,
    *,
    columns: Mapping[str, str] = {},
    labels: Mapping[str, str] = {},
    labelled: bool = True,
) -> Rows:
    """Read a CSV, JSONL or Parquet file, a folder of images or wav by label, or a glob.

    Where a text itself is predicted, also a ``.txt`` file or a folder of them.

    The data set has ``text`` (string), ``image`` (``datasets.Image``), ``audio`` or ``video``
    (bytes or path of a file), ``label`` (int64 index into ``job.job.labels``) and, where the job
    has groups, ``group`` (``read_groups``). ``columns`` maps a column of the job's schema to the
    site's, ``labels`` a value of the site's to the job's name. A label is that name or, where no
    name matches, its index; where rows are not ``labelled`` it is ``IGNORED`` and no column is
    needed.
    Nothing is coerced, dropped or filled in; the one exception is a job whose
    ``data.on_bad_image``, ``on_bad_audio`` or ``on_bad_video`` is ``"skip"``.

    Raises:
        DataError: the first thing that is wrong with the files, and where.
    """
    task = TASKS[job.job.task]
    if task.target == "tokens":
        return Rows(_texts(path, job, columns, paired=task.paired), skipped=0)
    kind = task.modality
    labelled = labelled and task.target == "label"
    schema = job.data.column(kind)
    _check_mappings(job, schema, columns, labels)
    content, label = columns.get(schema, schema), columns.get(job.data.label, job.data.label)
    named = LabelIndex(job.job.labels, labels)
    if labelled:
        tables = read_tables(path, content=content, label=label, images=kind != "text")
        targets = [named.of(table, row) for table in tables for row in range(len(table.labels))]
    else:
        tables = read_tables(path, content=content, label=None, images=kind != "text")
        none = IGNORED if task.target == "label" else 0
        targets = [none] * sum(len(table.contents) for table in tables)
    groups = read_groups(path, job.data, columns) if job.data.groups else None
    if kind == "text":
        texts = [_text(table, row) for table in tables for row in range(len(table.contents))]
        return Rows(_dataset("text", texts, targets, groups), skipped=0)
    good = _readable(tables, kind, skip=job.data.skips(kind))
    contents = [one for table in tables for one in table.contents]
    kept = np.flatnonzero(good)
    if not len(kept):
        what = {"image": "image", "audio": "wav file", "video": "clip"}[kind]
        raise DataError(f"no {what} of {path} decodes", hint=f"are these {what}s at all?")
    groups = None if groups is None else groups[kept]
    dataset = _dataset(kind, [contents[i] for i in kept], [targets[i] for i in kept], groups)
    return Rows(dataset, skipped=len(good) - len(kept))


def _texts(path: str, job: Job, columns: Mapping[str, str], *, paired: bool) -> datasets.Dataset:
    """Texts to be predicted themselves, or each with the text beside it that is to be."""
    asked = [job.data.text, job.data.target] if paired else [job.data.text]
    _check_columns(columns, asked)
    own = [columns.get(name, name) for name in asked]
    tables = read_tables(path, content=own[0], label=own[1] if paired else None, images=False)
    places = [(table, row) for table in tables for row in range(len(table.contents))]
    texts = {"text": [_text(*place) for place in places]}
    if paired:
        texts["target"] = [_text(*place, "target") for place in places]
    return _made(texts, {"label": [0] * len(places)}, datasets.Value("string"))


def _dataset(
    column: str, contents: list[Any], labels: list[int], groups: Indices | None
) -> datasets.Dataset:
    kind: Any = datasets.Image() if column == "image" else datasets.Value("string")
    if column in ("audio", "video"):  # datasets would decode, with packages that it asks for
        kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    numbers = {"label": labels, **({} if groups is None else {"group": groups})}
    return _made({column: contents}, numbers, kind)


def _made(
    contents: Mapping[str, list[Any]], numbers: Mapping[str, Any], kind: Any
) -> datasets.Dataset:
    kinds = {**dict.fromkeys(contents, kind), **dict.fromkeys(numbers, datasets.Value("int64"))}
    features = datasets.Features(kinds)
    table = pa.table({**contents, **numbers}, schema=features.arrow_schema)
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
    asked = (schema, job.data.label, job.data.group)
    _check_columns(columns, [name for name in asked if name is not None])
    for value, name in labels.items():
        if name not in job.job.labels:
            raise DataError(
                f"data.labels maps {value!r} to {name!r}, which is not a label of the job",
                hint=nearest_label(name, job.job.labels),
            )


def _check_columns(columns: Mapping[str, str], asked: Sequence[str]) -> None:
    for name in columns:
        if name not in asked:
            raise DataError(
                f"data.columns maps {name!r}, which this job does not ask for",
                hint=f"it asks for {' and '.join(map(repr, asked))}",
            )


def _text(table: Table, row: int, what: str = "text") -> str:
    value = (table.contents if what == "text" else table.labels)[row]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{table.place(row)} has no {what}", hint="fill it in or remove the row")
    if not isinstance(value, str):
        raise DataError(
            f"{table.place(row)}: the {what} is a {type(value).__name__}, not a string",
            hint="write it in quotes, or map the right column in [data.columns] of site.toml",
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise DataError(
            f"{table.place(row)}: the {what} has a broken character (half a surrogate pair)",
            hint="remove the lone \\ud8xx escape",
        ) from None
    return value


def _readable(tables: Sequence[Table], kind: Modality, *, skip: bool) -> NDArray[np.bool_]:
    """Which images or recordings decode; without ``skip`` all do.

    Images in threads: PIL lets go of the interpreter. Filters of warnings, which scipy's reader
    needs, are not for threads.
    """
    places = [(table, row) for table in tables for row in range(len(table.contents))]
    # One task a block, because for small images handing out a task costs more than its work.
    blocks = [places[at : at + 64] for at in range(0, len(places), 64)]
    check = partial(_problems, kind)
    with ThreadPoolExecutor(None if kind == "image" else 1) as pool:
        found = [problem for block in pool.map(check, blocks) for problem in block]
    if not skip and (first := next(filter(None, found), None)):
        raise first
    return np.array([problem is None for problem in found])


def _problems(kind: Modality, places: Sequence[tuple[Table, int]]) -> list[DataError | None]:
    """What is wrong with each of these images or recordings."""
    found: list[DataError | None] = []
    for table, row in places:
        try:
            if table.contents[row] is None:
                raise DataError(f"no {kind}", hint="fill it in or remove the row")
            if kind == "audio":
                open_recording(table.contents[row])
            elif kind == "video":
                open_clip(table.contents[row], 1)
            else:
                to_channels(open_image(table.contents[row]), 3)  # what decodes may be unusable
            found.append(None)
        except DataError as error:
            told = f"{table.place(row)}: {error}" if table.numbers else str(error)
            found.append(DataError(told, hint=error.hint))
    return found


def encode(
    dataset: datasets.Dataset, processor: Processor, job: Job, *, store: Store | None, key: str
) -> Examples:
    """Tokenise or decode all rows of a data set as ``read_split`` gives it.

    Token ids, and pixels where they are many, are kept in files of ``store`` under a name made of
    ``key`` (the backbone's fingerprint), the processor, the rows and the job's settings: a second
    call reads them back. Files appear complete or not at all. Without ``store``: in memory.

    Raises:
        BackboneError: ``data.max_length`` is more than the backbone can read.
        DataError: an image or a recording changed since it was read, or a text becomes no tokens.
    """
    rows = dataset.with_format("arrow")[:]
    labels = rows["label"].to_numpy().astype(np.int64)
    examples: TextExamples | ImageExamples | AudioExamples
    if isinstance(processor, TextProcessor):
        check_length(processor, job.data.max_length)
        texts = rows["text"].to_pylist()
        if TASKS[job.job.task].paired:
            return encode_pairs(texts, rows["target"].to_pylist(), processor, job)
        if TASKS[job.job.task].masked:
            return encode_cloze(texts, processor, job, store=store, key=key)
        if TASKS[job.job.task].target == "tokens":
            return encode_blocks(texts, processor, job.data.max_length, store=store, key=key)
        examples = encode_texts(texts, labels, processor, job.data.max_length, store=store, key=key)
    elif isinstance(processor, AudioProcessor):
        name = digest_of(key, content_digest(dataset))
        examples = encode_recordings(dataset, labels, processor, job, store=store, key=name)
    elif isinstance(processor, VideoProcessor):
        name = digest_of(key, content_digest(dataset))
        examples = encode_clips(dataset, labels, processor, job, store=store, key=name)
    else:
        examples = _encode_images(dataset, labels, processor, job, store, key)
        if TASKS[job.job.task].target == "patches":
            return hide_patches(examples, job)
    if "group" in rows.column_names:
        return replace(examples, groups=rows["group"].to_numpy().astype(np.int64))
    return examples


def _encode_images(
    dataset: datasets.Dataset,
    labels: Indices,
    processor: ImageProcessor,
    job: Job,
    store: Store | None,
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

    def name() -> str:
        return digest_of(key, processor.identity, normalize, content_digest(dataset))

    return ImageExamples(labels, filled_array(store, shape, fill, name), every)


def content_digest(dataset: datasets.Dataset) -> str:
    """SHA-256 of all texts or files of a data set, in order: its labels do not count."""
    if "text" in dataset.column_names:
        return texts_digest(dataset.with_format("arrow")[:]["text"].to_pylist())
    column = next(one for one in ("image", "audio", "video") if one in dataset.column_names)
    if column == "image":
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    digest = hashlib.sha256()
    for batch in dataset.select_columns([column]).iter(batch_size=256):
        for value in batch[column]:
            data = _file_bytes(value)
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _file_bytes(source: Mapping[str, Any]) -> bytes:
    data = source["bytes"]
    return bytes(data) if data is not None else Path(source["path"]).read_bytes()


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
