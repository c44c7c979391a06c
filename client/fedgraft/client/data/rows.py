"""A site's rows in the job's schema, and as the arrays that a model reads.

There are two steps, so that a mistake is found before anything is computed. ``read_split`` checks
every row and returns a Hugging Face data set of the content, ``label`` and the other columns that
the task stores. ``encode`` tokenises or decodes the rows once, for all rounds. A cache folder holds
the content of rows, so it belongs to the site.
"""

import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from fedgraft.client.data.cache import Keeper, Store
from fedgraft.client.data.files import Table, read_tables
from fedgraft.client.data.groups import read_groups
from fedgraft.common.config.job import Job
from fedgraft.common.errors import DataError
from fedgraft.common.examples import Examples
from fedgraft.common.tasks import TASKS
from fedgraft.common.tasks.base import Cell, Reading, Task, composed
from fedgraft.common.tasks.labels import nearest_label

__all__ = ["KINDS", "Columns", "SplitRows", "encode", "read_split"]

_FILE = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
KINDS: dict[str, Any] = {
    "string": datasets.Value("string"),
    "strings": datasets.List(datasets.Value("string")),
    "int64": datasets.Value("int64"),
    "int64s": datasets.List(datasets.Value("int64")),
    "float64": datasets.Value("float64"),
    "image": datasets.Image(),
    # ``datasets`` would decode other kinds of files itself, and needs more packages for that.
    "file": _FILE,
}
"""The storage types of columns, by the names that modalities and tasks use."""
UNREADABLE = "files that cannot be used"
AT_ONCE = 64  # cells that a thread checks in one task
DIGESTED = 256  # files read at once


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split, checked by ``read_split``.

    ``files`` are those that the cells of tables name; ``content`` is the column of texts or files.
    ``left_out`` counts what was not read, by the reason. ``labels_read`` is how labels were read:
    as ``names`` or as ``indices``; empty without labels.
    """

    dataset: datasets.Dataset
    files: tuple[Path, ...]
    content: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    labels_read: str = ""

    @property
    def skipped(self) -> int:
        """Return the number of files that cannot be used and were left out, as the job allows."""
        return self.left_out.get(UNREADABLE, 0)

    def only(self, index: NDArray[np.int64]) -> "SplitRows":
        """Return the rows at ``index``; ``files`` stays as it is."""
        return replace(self, dataset=self.dataset.select(index))

    def digests(self) -> list[bytes]:
        """Return SHA-256 over the content of each row: a text, or a file's bytes."""
        return Columns(self.dataset).row_digests(self.content)


@dataclass(frozen=True)
class Columns:
    """The rows of a data set in the form that encoders need (``common.encoding.Rows``)."""

    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def column(self, name: str) -> list[Any]:
        """Return all values of a column."""
        values: list[Any] = self.dataset.with_format("arrow")[:][name].to_pylist()
        return values

    def batches(self, name: str, size: int) -> Iterator[list[Any]]:
        """Yield the values of a column, ``size`` rows at a time."""
        arrow = self.dataset.select_columns([name]).with_format("arrow")
        for batch in arrow.iter(batch_size=size):
            yield batch[name].to_pylist()

    def row_digests(self, name: str) -> list[bytes]:
        """Return SHA-256 over each text, or each file's bytes, of a column, in order."""
        return [
            hashlib.sha256(_content_bytes(value)).digest()
            for batch in self.batches(name, DIGESTED)
            for value in batch
        ]

    def digest(self, name: str) -> str:
        """Return SHA-256 (hex) over the texts, or the files' bytes, of a column, in order."""
        digest = hashlib.sha256()
        for batch in self.batches(name, DIGESTED):
            for value in batch:
                data = _content_bytes(value)
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()


def read_split(
    path: str,
    job: Job,
    *,
    columns: Mapping[str, str] = {},
    labels: Mapping[str, str] = {},
    labelled: bool = True,
) -> SplitRows:
    """Read a CSV, JSONL or Parquet file, a folder of files by label, or a glob.

    If only the content column is read, ``path`` may also be a ``.txt`` file, a folder of them, or a
    folder of files at any depth.

    The data set has the content under ``Task.content``, ``label`` (int64), the other columns that
    the task stores and, if the job has groups, ``group`` (``read_groups``). ``columns`` maps a
    column of the job's schema to the site's column; it may also map columns of other tasks.
    ``labels`` maps a value of the site's label column to the job's name. If rows are not
    ``labelled``, no column of labels is needed. Nothing is coerced, dropped or filled in; the one
    exception is a job whose ``data.on_bad_...`` is ``"skip"``.

    Raises:
        DataError: the first error in the files, and its place.
    """
    task, modality = job.task, job.task.modality
    content = job.data.column(task.content)
    beside = job.data.column(task.beside) if task.beside else None
    _check_mappings(job, columns, labels)
    read_beside = beside is not None and (labelled or not task.labelled)
    tables = read_tables(
        path,
        content=columns.get(content, content),
        label=columns.get(beside, beside) if beside is not None and read_beside else None,
        images=modality.files,
        labels=[*job.job.labels, *labels],
    )
    places = [(table, row) for table in tables for row in range(len(table.contents))]
    reading = Reading(job.job.labels, labels, labelled, keys=job.settings.keys)
    found = _beside(task, places, reading)
    if job.data.groups:
        found["group"] = read_groups(path, job.data, columns).tolist()
    good = _readable(task, places, skip=job.data.skips(modality.name))
    kept = np.flatnonzero(good).tolist()
    if not kept:
        what = modality.one_file
        raise DataError(f"no {what} of {path} decodes", hint=f"are these {what}s at all?")
    contents = [places[at][0].contents[places[at][1]] for at in kept]
    chosen = {name: [values[at] for at in kept] for name, values in found.items()}
    kinds = {name: KINDS[task.stored.get(name, "int64")] for name in found}
    dataset = _made(
        {task.content: contents, **chosen}, {task.content: KINDS[task.content_kind], **kinds}
    )
    cells = [cell for table in tables if table.numbers for cell in table.contents]
    named = tuple(Path(one["path"]) for one in cells if isinstance(one, dict) and one["path"])
    left_out = sum((Counter(table.left_out) for table in tables), Counter[str]())
    left_out[UNREADABLE] += len(places) - len(kept)
    read = reading.taken[0] if reading.taken else ""
    return SplitRows(dataset, named, task.content, dict(+left_out), read)


def encode(
    dataset: datasets.Dataset, processor: Any, job: Job, *, store: Store | None, key: str
) -> Examples:
    """Tokenise or decode all rows of a data set from ``read_split``.

    Token ids, and pixels if there are many, are cached in files of ``store``. Their name is made of
    ``key`` (the backbone's fingerprint), the processor, the rows and the job's settings, so a
    second call reads them back. Files appear complete or not at all. Without ``store``, the arrays
    are in memory.

    Raises:
        BackboneError: ``data.max_length`` is more than the backbone can read.
        DataError: an image or a recording changed since it was read, or a text becomes no tokens.
    """
    return job.task.encode(Columns(dataset), processor, job.settings, Keeper(store, key))


Place = tuple[Table, int]


def _beside(task: Task, places: Sequence[Place], reading: Reading) -> dict[str, list[Any]]:
    """Return the values beside each content, by column of the rows."""
    found: dict[str, list[Any]] = {name: [] for name in ("label", *task.stored)}
    for table, row in places:
        cell = Cell(table.contents[row], table.labels[row], table.typed)
        try:
            for name, value in task.read(cell, reading).items():
                found[name].append(value)
        except DataError as error:
            raise DataError(f"{table.place(row)}: {error}", hint=error.hint) from None
    return found


def _made(values: Mapping[str, list[Any]], kinds: Mapping[str, Any]) -> datasets.Dataset:
    features = datasets.Features(dict(kinds))
    table = pa.table(dict(values), schema=features.arrow_schema)
    # from_dict would pickle and hash the table for a fingerprint. A small site would spend most of
    # its reading time on that, and encode hashes the contents itself.
    return datasets.Dataset(
        InMemoryTable(table),
        info=datasets.DatasetInfo(features=features),
        fingerprint=uuid.uuid4().hex,
    )


def _check_mappings(job: Job, columns: Mapping[str, str], labels: Mapping[str, str]) -> None:
    """Check that the mappings of ``site.toml`` have names that a job can ask for.

    A site has one file for all its jobs, so it may map columns that another task reads.
    """
    keys = [key for task in TASKS.values() for key in (task.content, task.beside) if key]
    known = {job.data.group, *keys, *map(job.data.column, keys)}
    for name in columns:
        if name not in known:
            wanted = [job.task.content, job.task.beside]
            asked = [job.data.column(key) for key in wanted if key] + [job.data.group]
            raise DataError(
                f"data.columns maps {name!r}, which no job asks for",
                hint=f"this job asks for {' and '.join(repr(one) for one in asked if one)}",
            )
    spelt = [composed(value) for value in labels]
    if len(set(spelt)) < len(spelt):
        raise DataError(
            "data.labels maps one value twice, in two spellings of one letter",
            hint="keep one of them: both are the same to a reader",
        )
    known = {composed(name) for name in job.job.labels}
    for value, name in labels.items() if job.task.wants_labels else ():
        if composed(name) not in known:
            raise DataError(
                f"data.labels maps {value!r} to {name!r}, which is not a label of the job",
                hint=nearest_label(name, job.job.labels),
            )


def _readable(task: Task, places: Sequence[Place], *, skip: bool) -> NDArray[np.bool_]:
    """Return the mask of cells that can be read; without ``skip``, a bad cell is an error.

    Cells are checked in threads if the modality allows it. Warning filters, which scipy's reader
    needs, do not work in threads.
    """
    # One task per block, because for small images starting a task costs more than its work.
    blocks = [places[at : at + AT_ONCE] for at in range(0, len(places), AT_ONCE)]
    with ThreadPoolExecutor(None if task.modality.threads else 1) as pool:
        checked = pool.map(partial(_problems, task), blocks)
        found = [problem for block in checked for problem in block]
    if not skip and (first := next(filter(None, found), None)):
        raise first
    return np.array([problem is None for problem in found], np.bool_)


def _problems(task: Task, places: Sequence[Place]) -> list[DataError | None]:
    """Return the error of each of these cells; None for a good cell."""
    found: list[DataError | None] = []
    for table, row in places:
        try:
            if table.numbers and task.modality.files:
                _check_named(table.contents[row])
            task.check_cell(table.contents[row])
            found.append(None)
        except DataError as error:
            place = table.place(row)
            told = str(error) if place in str(error) else f"{place}: {error}"
            found.append(DataError(told, hint=error.hint))
    return found


def _content_bytes(value: Any) -> bytes:
    """Return the bytes of a value or a file; for a list, those of each item after its length."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int | float):
        return repr(value).encode()
    if isinstance(value, list):
        parts = [_content_bytes(one) for one in value]
        return b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    data = value["bytes"]
    return bytes(data) if data is not None else Path(value["path"]).read_bytes()


def _check_named(cell: Any) -> None:
    """Check that a cell of a table with a path names a file; its text is never repeated.

    Raises:
        DataError: there is no such file.
    """
    path = cell["path"] if isinstance(cell, dict) and cell["bytes"] is None else None
    if path is None or os.path.isfile(path):
        return
    if os.path.islink(path):
        raise DataError(
            "its cell names a link that points to nothing",
            hint="fetch what it points to (such as `git annex get` or `datalad get`)",
        )
    raise DataError(
        "its cell names no file that is here",
        hint="write a path relative to the data file; base64 text is no path: save it as a file, "
        "or as bytes in Parquet",
    )
