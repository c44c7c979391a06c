"""Random rows of any task, and the files that a site may have them in: all by the task's contract.

A row is a dictionary as ``read_split`` gives it: what is read, the label, and what else is stored.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from support.clips import write_clip
from support.recordings import tone, write_wav

from fedgraft.client.data.rows import KINDS, Columns
from fedgraft.common.config.job import Job
from fedgraft.common.modalities import Modality
from fedgraft.common.tasks import Task

__all__ = [
    "FORMS",
    "Row",
    "draw_content",
    "draw_rows",
    "forms_of",
    "raw_row",
    "rows_of",
    "sort_rows",
    "write_lines",
]

Row = dict[str, Any]
WriteFile = Callable[[Path, np.random.Generator], None]
WORDS = ("the", "cat", "sees", "a", "dog", "why", "but", "runs")


def draw_rows(job: Job, count: int, folder: Path, *, seed: int = 0) -> list[Row]:
    """``count`` rows; where they are labelled, each label comes about as often as any other."""
    task, draw = job.task, np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = number % len(job.job.labels) if task.labelled else 0
        content = draw_content(task.modality, draw, folder / f"{seed}-{number}")
        if task.content_kind == "strings":
            content = content.split()
        stored = {name: _stored(kind, job, content, draw) for name, kind in task.stored.items()}
        rows.append({task.content: content, "label": label, **stored})
    return rows


def draw_content(modality: Modality, draw: np.random.Generator, path: Path) -> Any:
    """A cell: a few words, or a file that was made at ``path``."""
    if not modality.files:
        return " ".join(str(word) for word in draw.choice(WORDS, draw.integers(2, 6)))
    path.parent.mkdir(parents=True, exist_ok=True)
    make, suffix = file_of(modality)
    make(path.with_suffix(suffix), draw)
    return {"bytes": path.with_suffix(suffix).read_bytes(), "path": None}


def _stored(kind: str, job: Job, content: Any, draw: np.random.Generator) -> Any:
    """A value of a column that a task stores beside: one a word where it is a list of numbers."""
    if kind == "string":
        return " ".join(str(word) for word in draw.choice(WORDS, 3))
    if kind == "int64s":
        return [int(one) for one in draw.integers(0, len(job.job.labels), len(content))]
    if kind == "float64":
        numbers = [one for one in job.settings.keys.values() if not isinstance(one, str)]
        return float(draw.uniform(min(numbers, default=0.0), max(numbers, default=1.0)))
    raise NotImplementedError(f"no random value of the kind {kind}: draw one here")


def _write_image(path: Path, draw: np.random.Generator) -> None:
    Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(path)


def _write_recording(path: Path, draw: np.random.Generator) -> None:
    seconds, pitch = draw.uniform(0.1, 0.25), draw.uniform(200, 2000)
    write_wav(path, tone(pitch, seconds=seconds) * draw.uniform(0.2, 1))


def _write_clip(path: Path, draw: np.random.Generator) -> None:
    write_clip(path, right=bool(draw.integers(2)), seed=int(draw.integers(1 << 30)), frames=5)


FILES: dict[str, tuple[WriteFile, str]] = {
    "image": (_write_image, ".png"),
    "audio": (_write_recording, ".wav"),
    "video": (_write_clip, ".mp4"),
}
"""How a file of each modality that reads files is made, and the end of its name."""


def file_of(modality: Modality) -> tuple[WriteFile, str]:
    """Return the entry of ``FILES`` for a modality that reads files."""
    if modality.name not in FILES:
        raise NotImplementedError(f"no file that {modality.name} reads: add a row to FILES here")
    return FILES[modality.name]


# Files of a site


def raw_row(job: Job, row: Row) -> dict[str, Any]:
    """What stands beside the content, by the columns of a site's file."""
    written = job.task.write(row, job.job.labels)
    return {job.data.column(key): value for key, value in written.items()}


def _cells(job: Job, rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """Rows as tables have them that name files by their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    task, cells = job.task, []
    for number, row in enumerate(rows):
        content = row[task.content]
        if task.modality.files:
            name = f"{number:03d}{file_of(task.modality)[1]}"
            (folder / name).write_bytes(content["bytes"])
            content = name
        cells.append({job.data.column(task.content): content, **raw_row(job, row)})
    return cells


def write_lines(path: Path, cells: Sequence[Mapping[str, Any]]) -> Path:
    """``cells`` as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells), encoding="utf-8")
    return path


def _write_jsonl(job: Job, rows: Sequence[Row], folder: Path) -> Path:
    return write_lines(folder / "rows.jsonl", _cells(job, rows, folder))


def _write_csv(job: Job, rows: Sequence[Row], folder: Path) -> Path:
    cells = _cells(job, rows, folder)
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(cells[0]))
        table.writeheader()
        table.writerows(cells)
    return folder / "rows.csv"


def _write_parquet(job: Job, rows: Sequence[Row], folder: Path) -> Path:
    """With files embedded."""
    folder.mkdir(parents=True, exist_ok=True)
    task, beside = job.task, [raw_row(job, row) for row in rows]
    kind = datasets.Features({"content": KINDS[task.content_kind]}).arrow_schema.field(0).type
    columns = {
        job.data.column(task.content): pa.array([row[task.content] for row in rows], kind),
        **{name: pa.array([one[name] for one in beside]) for name in beside[0]},
    }
    parquet.write_table(pa.table(columns), folder / "rows.parquet")
    return folder / "rows.parquet"


def _write_folder(job: Job, rows: Sequence[Row], folder: Path) -> Path:
    """A folder a label, or all files in one."""
    for number, row in enumerate(rows):
        label = job.job.labels[row["label"]] if job.task.labelled else ""
        suffix = file_of(job.task.modality)[1]
        path = folder / "files" / label / f"{number:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row[job.task.content]["bytes"])
    return folder / "files"


FORMS: dict[str, Callable[[Job, Sequence[Row], Path], Path]] = {
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
    "csv": _write_csv,
    "folder": _write_folder,
}
"""Writes rows below a folder; the path that a site would name."""


def forms_of(job: Job, row: Row) -> tuple[str, ...]:
    """The forms in which a site may have rows such as ``row``."""
    task = job.task
    content = None if task.modality.files else row[task.content]
    flat = not any(isinstance(one, list | dict) for one in (content, *raw_row(job, row).values()))
    foldable = task.modality.files and (task.beside is None or task.labelled)
    wanted = {"jsonl": True, "parquet": True, "csv": flat, "folder": foldable}
    return tuple(name for name, fits in wanted.items() if fits)


# Rows as they were read


def rows_of(dataset: datasets.Dataset, task: Task) -> list[Row]:
    """The rows of a data set of ``read_split``, files by their bytes."""
    columns = Columns(dataset)
    names = (task.content, "label", *task.stored)
    assert set(dataset.column_names) == set(names)
    rows = [
        dict(zip(names, values, strict=True))
        for values in zip(*(columns.column(name) for name in names), strict=True)
    ]
    for row in rows if task.modality.files else ():
        source = row[task.content]
        data = Path(source["path"]).read_bytes() if source["bytes"] is None else source["bytes"]
        row[task.content] = {"bytes": data, "path": None}
    return rows


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows in an order of their own; a folder has another than the table they came from."""
    assert not any(isinstance(v, float) and math.isnan(v) for row in rows for v in row.values())
    return sorted(rows, key=repr)
