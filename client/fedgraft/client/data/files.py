"""Read the columns that a job asks for from a site's own files, and refuse rows that are not clean.

``datasets.load_dataset`` is not used for this. It copies a site's rows into a cache in the home
folder, reads the text "NA" as missing and "007" as the number 7, and reports a broken row without
its line. Its silent changes are errors here. No message repeats the text of a
row, except a label of a few characters (``tasks.labels``).
"""

import csv
import difflib
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedgraft.client.data.class_names import class_name, class_names
from fedgraft.client.data.folders import (
    LITTER,
    SPECIAL,
    is_litter,
    is_special,
    label_files,
    walk,
)
from fedgraft.client.data.headers import check_columns, listed
from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import composed

__all__ = [
    "READERS",
    "Table",
    "column_names",
    "find_sources",
    "is_text",
    "read_tables",
]

Row = tuple[int, Any, Any]  # line or row number, content, label

TEXT = ".txt"
OTHER = f"files that are no {TEXT} files"
LONGEST_CELL = 2**31 - 1  # characters of a CSV field; the csv module's own limit is 131,072


@dataclass(frozen=True)
class Table:
    """The raw contents and labels of one source, in its order.

    A content is a text, or an image as ``{"bytes", "path"}``. ``typed`` says that the source
    distinguishes the number 3 from the text "3"; CSV cells and folder names do not. ``left_out``
    counts what a folder has beside its data, by the reason.
    """

    path: Path
    contents: list[Any]
    labels: list[Any]
    numbers: Sequence[int]
    unit: str
    typed: bool
    left_out: Mapping[str, int] = field(default_factory=dict)

    def place(self, index: int) -> str:
        """Return the place of row ``index`` for a person: the image file, or data file and line."""
        if not self.numbers:
            return str(self.contents[index]["path"])
        return f"{self.path}, {self.unit} {self.numbers[index]}"


def find_sources(path: str) -> list[Path]:
    """Return the file or folder at ``path``, or all matches of the glob ``path``, in sorted order.

    Raises:
        DataError: nothing is there, or a pipe.
    """
    if is_special(Path(path)):
        raise DataError(
            f"{path} is a pipe, a socket or a device",
            hint="save the rows as a file: they are read again",
        )
    if Path(path).exists():
        return [Path(path)]
    if glob.has_magic(path):
        found, _ = _matches(path)
        if found:
            return found
        raise DataError(f"nothing matches {path}", hint="check the pattern and the working folder")
    folder = Path(path).parent
    if not folder.is_dir():
        raise DataError(f"no file {path}", hint=f"there is no folder {folder} either")
    beside = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(Path(path).name, beside, n=1)
    hint = f"did you mean {near[0]}?" if near else f"in {folder}: {listed(beside) or 'nothing'}"
    raise DataError(f"no file {path}", hint=hint)


def _matches(path: str) -> tuple[list[Path], Counter[str]]:
    """Return what the pattern ``path`` matches, without litter, and the counts of what is left out.

    A folder that the pattern itself names is no litter.
    """
    literal, left_out, found = set(Path(path).parts), Counter[str](), []
    for one in map(Path, sorted(glob.glob(path, recursive=True))):
        above = any(
            part not in literal and is_litter(Path(part), folder=True) for part in one.parts[:-1]
        )
        if above or is_litter(one, folder=one.is_dir()):
            left_out[LITTER] += one.is_file()
        elif is_special(one):
            left_out[SPECIAL] += 1
        else:
            found.append(one)
    return found, +left_out


def watched(path: str) -> list[Path]:
    """Return what changes if rows are added, removed or altered at ``path``: files and folders.

    Raises:
        DataError: nothing is there.
    """
    found: list[Path] = []
    for source in find_sources(path):
        found.append(source)
        if source.is_dir():
            found += sorted({*source.rglob("*"), *walk(source).files})  # behind links, too
    return found


def read_tables(
    path: str, *, content: str, label: str | None, images: bool, labels: Collection[str] = ()
) -> list[Table]:
    """Read the columns ``content`` and ``label`` of all sources at ``path`` (file, folder, glob).

    With ``images`` (or recordings), a folder holds one folder per label of ``labels``. The label of
    a single image file is the name of its folder. The ``content`` of a table is an embedded image,
    or the path of one, relative to the table.

    Without a ``label``, all labels are None. Each ``.txt`` file is one text, also in a folder. With
    ``images``, a folder gives all files in it, at any depth.

    Raises:
        DataError: a source is missing, empty, malformed, not UTF-8, or lacks one of the columns.
    """
    tables, loose = [], []
    for source in find_sources(path):
        if source.is_dir() and label is None and images:
            tables.append(_anywhere(source))
        elif source.is_dir() and label is None:
            tables.extend(_read_texts(source))
        elif source.is_dir():
            tables.append(_read_folder(source, labels, images=images))
        elif source.suffix.lower() in READERS or (label is None and is_text(source)):
            tables.append(_read_file(source, content, label, images=images))
        elif images:
            loose.append((source, source.parent.name))
        else:
            raise DataError(
                f"{source} is not a kind of file that can be read",
                hint=f"give one of {', '.join(READERS)}{' or .txt' if label is None else ''}",
            )
    if loose:
        tables.append(_image_table(Path(path), loose))
    if not Path(path).exists():  # a pattern
        tables[0] = replace(tables[0], left_out=Counter(tables[0].left_out) + _matches(path)[1])
    return tables


def is_text(path: Path) -> bool:
    """Return whether a file is one text, by its name."""
    return path.suffix.lower() == TEXT


def _read_texts(path: Path) -> list[Table]:
    """Read every ``.txt`` file in the folder ``path`` and below it, in sorted order."""
    found = walk(path)
    files = [file for file in found.files if is_text(file)]
    if not files:
        raise DataError(
            f"{path} has no {TEXT} files",
            hint=f"put texts there, or name a table such as {path}/texts.jsonl",
        )
    left_out = found.left_out + Counter({OTHER: len(found.files) - len(files)})  # no zeros
    first, *rest = [_read_file(file, "", None, images=False) for file in files]
    return [replace(first, left_out=left_out), *rest]


def _anywhere(path: Path) -> Table:
    found = walk(path)
    if not found.files:
        raise DataError(f"{path} has no files", hint="put the site's files there")
    return _image_table(path, [(file, "") for file in found.files], found.left_out)


def _read_file(path: Path, content: str, label: str | None, *, images: bool) -> Table:
    suffix = path.suffix.lower()
    if suffix == TEXT:
        return Table(path, ["".join(_lines(path))], [None], (1,), "line", typed=True)
    numbers, contents, labels = [], [], []
    for number, one, name in READERS[suffix](path, content, label):
        numbers.append(number)
        contents.append(_image_source(one, path.parent) if images else one)
        labels.append(name)
    if not contents:
        raise DataError(f"{path} has no rows", hint="put at least one row under the header")
    unit = "row" if suffix == ".parquet" else "line"
    return Table(path, contents, labels, numbers, unit, typed=suffix != ".csv")


def _read_folder(path: Path, labels: Collection[str], *, images: bool) -> Table:
    if not images:
        raise DataError(
            f"{path} is a folder, and this job reads text",
            hint=f"name a file, or a pattern such as {path}/*.jsonl",
        )
    found = label_files(path, labels)
    if not found.files:
        raise DataError(
            f"{path} has no files in label folders",
            hint=f"put them into {path}/<label>/, one folder per label of the job",
        )
    files = [(file, file.relative_to(path).parts[0]) for file in found.files]
    return _image_table(path, files, found.left_out)


def _image_table(
    path: Path, files: Iterable[tuple[Path, str]], left_out: Mapping[str, int] | None = None
) -> Table:
    pairs = [({"bytes": None, "path": os.path.abspath(file)}, label) for file, label in files]
    contents, labels = [one for one, _ in pairs], [label for _, label in pairs]
    return Table(path, contents, labels, (), "file", typed=False, left_out=left_out or {})


def _image_source(value: Any, folder: Path) -> dict[str, Any] | None:
    """Return an image cell as ``{"bytes", "path"}``; None if it is empty or is no image."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str) and value:
        return {"bytes": None, "path": os.path.abspath(folder / value)}
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {"bytes": value["bytes"], "path": None}
    if isinstance(value, dict) and value.get("path"):
        return _image_source(value["path"], folder)
    return None


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without the byte-order mark that spreadsheets write."""
    offset = 0
    try:
        with path.open("rb") as file:
            for line in file:
                text = line.decode("utf-8")
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {offset + error.start})",
            hint='save the file as UTF-8 (in a spreadsheet: "CSV UTF-8")',
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="check its owner"
        ) from None


def _read_csv(path: Path, content: str, label: str | None) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = [composed(name) for name in next(reader, [])]
        if not header:
            raise DataError(f"{path} is empty", hint="its first line must name the columns")
        content, label = composed(content), label and composed(label)
        check_columns(path, header, content, label, typed=False)
        at, named = header.index(content), header.index(label) if label else None
        start = reader.line_num + 1  # a quoted cell may span lines: its row is at the first
        for row in reader:
            number, start = start, reader.line_num + 1
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {number} has {len(row)} fields, the header has {len(header)}",
                    hint="put quotes around fields that contain a comma",
                )
            if row:
                yield number, row[at], None if named is None else row[named]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num} is not valid CSV: {error}",
            hint='quote fields with " and double the quotes inside; or save the data as JSONL',
        ) from None


class _Twice(Exception):
    """An object has two values for one key; the text says so without them."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON by composed keys.

    Raises:
        _Twice: two keys are equal, also if only in composed form.
    """
    found = {composed(name): value for name, value in pairs}
    if len(found) < len(pairs):
        raise _Twice(f"a key twice: it names {len(pairs)} values by {len(found)} keys")
    return found


def _read_jsonl(path: Path, content: str, label: str | None) -> Iterator[Row]:
    checked = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except _Twice as error:
            raise DataError(
                f"{path}, line {number} has {error}", hint="keep one of them: which one is meant?"
            ) from None
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or large"
            raise DataError(
                f"{path}, line {number} is not valid JSON: {reason}",
                hint='each line must be one object such as {"text": "...", "label": "..."}',
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number} is not a JSON object",
                hint="JSONL has one object per line, without a list around them",
            )
        if not checked:
            content, label = composed(content), label and composed(label)
            check_columns(path, list(row), content, label, typed=True)
            checked = True
        yield number, row.get(content), row.get(label) if label else None


def _read_parquet(path: Path, content: str, label: str | None) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            spelt = {composed(name): name for name in schema.names}
            check_columns(path, [composed(name) for name in schema.names], composed(content),
                          label and composed(label), typed=True)  # fmt: skip
            content, label = spelt[composed(content)], label and spelt[composed(label)]
            names = class_names(path, schema, label) if label else []
            rows = itertools.count(1)
            wanted = [content, label] if label else [content]
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                values = batch[label].to_pylist() if label else [None] * len(batch)
                for one, value in zip(batch[content].to_pylist(), values, strict=True):
                    row = next(rows)
                    yield row, one, class_name(path, row, names, value) if names else value
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise DataError(
            f"{path} is not a readable Parquet file", hint="write it again, with UTF-8 text columns"
        ) from None


READERS: dict[str, Callable[[Path, str, str | None], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def column_names(path: Path) -> list[str]:
    """Return the column names of a table's file: its header, or the keys of its first row.

    In a CSV file without a header, these are values.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                return list(file.schema_arrow.names)
        if path.suffix.lower() == ".csv":
            csv.field_size_limit(LONGEST_CELL)
            return next(csv.reader(_lines(path), strict=True), [])
        return list(json.loads(next(filter(str.strip, _lines(path)), "{}")))
    except (ValueError, TypeError, OSError, csv.Error, RecursionError):
        raise DataError(
            f"{path} cannot be read", hint=f"is it {path.suffix.lower()} inside, and for this user?"
        ) from None
