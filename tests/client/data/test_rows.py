"""A site's rows: read as they are or refused with the place, and encoded once."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fedgraft.client.data.rows import read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import DataError
from fedgraft.common.tasks import TASKS

SECRET = "patient Ada Lovelace"


def make_job(task: str = "text", labels: tuple[str, ...] = ("no", "yes"), **section: Any) -> Job:
    raw = {
        "job": {"name": "test", "task": f"{task}-classification", "labels": list(labels)},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "head"},
        "data": section,
    }
    return parse_job(raw, where="test")


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, *rows: object) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def picture(path: Path, value: int = 100, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value if mode == "L" else (value, 0, 0)).save(path)
    return path


# Reading


def test_csv_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    text = '\ufefftext,label\nNA,no\n007,yes\n"two\nlines, quoted",yes\n\n'
    rows = read_split(write(tmp_path / "a.csv", text), make_job())
    assert rows.dataset[:]["text"] == ["NA", "007", "two\nlines, quoted"]
    assert rows.dataset[:]["label"] == [0, 1, 1]
    assert rows.dataset.features["label"] == datasets.Value("int64")
    assert rows.skipped == 0


def test_columns_and_labels_of_the_site_are_mapped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "x", "y": "pos", "id": 3}, {"q": "z", "y": 0, "id": 4})
    labels = {"pos": "yes", "0": "yes"}
    rows = read_split(path, make_job(), columns={"text": "q", "label": "y"}, labels=labels)
    assert rows.dataset[:] == {"text": ["x", "z"], "label": [1, 1]}


def test_integers_are_indices_unless_they_are_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": value} for value in (0, 1, 2)))
    assert read_split(path, make_job(labels=("a", "b", "c"))).dataset[:]["label"] == [0, 1, 2]
    named = read_split(path, make_job(labels=("2", "0", "1")))
    assert named.dataset[:]["label"] == [1, 2, 0]
    text = write(tmp_path / "a.csv", "text,label\nx,1\n")
    assert read_split(text, make_job()).dataset[:]["label"] == [1]


def test_class_label_columns_keep_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert read_split(str(tmp_path / "a.parquet"), make_job()).dataset[:]["label"] == [1, 0]


def test_a_glob_reads_all_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "train.jsonl", {"text": name, "label": "no"})
    rows = read_split(str(tmp_path / "*" / "train.jsonl"), make_job())
    assert rows.dataset[:]["text"] == ["a", "b"]


BAD_TEXT: list[tuple[str, str | bytes, str, str]] = [
    ("a.csv", "", "is empty", "first line"),
    ("a.csv", "text,label\n", "has no rows", "at least one row"),
    ("a.jsonl", "", "has no rows", "at least one row"),
    (
        "a.csv",
        "Text,label\nx,no\n",
        "no column 'text'; its columns are: Text, label",
        "did you mean 'Text'? map it in [data.columns]",
    ),
    ("a.csv", "text;label\nx;no\n", "no column 'text'", "by commas"),
    ("a.csv", "text,label,text\nx,no,y\n", "column 'text' twice", "rename"),
    (
        "a.csv",
        f"text,label\n{SECRET},no\n{SECRET},yess\n",
        "line 3: label 'yess' is not in the job's list",
        "did you mean 'yes'?",
    ),
    ("a.csv", f'text,label\n"{SECRET}\n",no\n{SECRET},7\n', "line 4: label '7'", "0 to 1"),
    ("a.csv", f"text,label\n{SECRET}, and more,no\n", "line 2 has 3 fields", "quotes"),
    ("a.csv", f'text,label\n"{SECRET},no\n', "not valid CSV", "JSONL"),
    ("a.csv", f"text,label\n{SECRET},\n", "line 2: no label", "fill it in"),
    ("a.csv", "text,label\n ,no\n", "line 2: no text", "fill it in"),
    ("a.csv", b"text,label\nok,no\nna\xefve,no\n", "not UTF-8 (byte 19)", "UTF-8"),
    ("a.jsonl", b'{"text": "\xff", "label": "no"}\n', "not UTF-8 (byte 10)", "UTF-8"),
    (
        "a.jsonl",
        f'{{"text": "x", "label": "no"}}\n{{"text": "{SECRET}" "label": "no"}}\n',
        "line 2 is not valid JSON: Expecting ',' delimiter",
        "one object",
    ),
    ("a.jsonl", '[{"text": "x", "label": "no"}]\n', "line 1 is not a JSON object", "one object"),
    ("a.jsonl", '{"txt": "x", "label": "no"}\n', "its columns are: txt, label", "'txt'"),
    ("a.jsonl", '{"text": null, "label": "no"}\n', "line 1: no text", "fill it in"),
    ("a.jsonl", '{"text": "", "label": "no"}\n', "line 1: no text", "fill it in"),
    ("a.jsonl", '{"text": 7, "label": "no"}\n', "the text is a int, not a string", "quotes"),
    ("a.jsonl", '{"text": "\\ud800", "label": "no"}\n', "broken character", "lone"),
    ("a.jsonl", '{"text": "x", "label": null}\n', "line 1: no label", "fill it in"),
    ("a.jsonl", '{"text": "x", "label": true}\n', "label True is not", "labels are"),
    ("a.jsonl", '{"text": "x", "label": 1.0}\n', "label 1.0 is not", "labels are no, yes"),
    ("a.jsonl", '{"text": "x", "label": -1}\n', "label -1 is not", "labels are no, yes"),
    ("a.jsonl", '{"text": "x", "label": "1"}\n', "label '1' is not", "labels are no, yes"),
    ("a.parquet", b"PAR1 is not enough", "not a readable Parquet file", "write it again"),
    ("a.xlsx", b"PK", "not a kind of file that can be read", ".csv, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message", "hint"), BAD_TEXT)
def test_bad_text_is_refused(
    tmp_path: Path, name: str, content: str | bytes, message: str, hint: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_split(write(tmp_path / name, content), make_job())
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert name in str(caught.value)
    assert "Lovelace" not in str(caught.value) + caught.value.hint


def test_parquet_rows_are_counted_across_batches(tmp_path: Path) -> None:
    labels = ["no"] * 2000 + ["maybe"]
    parquet.write_table(pa.table({"text": ["x"] * 2001, "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2001: label 'maybe'"):
        read_split(str(tmp_path / "a.parquet"), make_job())


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"text": "x", "label": "no"})
    with pytest.raises(DataError, match="no file") as caught:
        read_split(str(tmp_path / "trian.jsonl"), make_job())
    assert caught.value.hint == "did you mean train.jsonl?"
    with pytest.raises(DataError) as caught:
        read_split(str(tmp_path / "nowhere" / "train.jsonl"), make_job())
    assert "there is no folder" in caught.value.hint
    with pytest.raises(DataError, match="nothing matches"):
        read_split(str(tmp_path / "*.csv"), make_job())


def test_a_folder_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this job reads text") as caught:
        read_split(str(tmp_path), make_job())
    assert "*.jsonl" in caught.value.hint


@pytest.mark.parametrize(
    ("mapping", "message", "hint"),
    [
        ({"columns": {"txt": "q"}}, "maps 'txt'", "'text' and 'label'"),
        ({"labels": {"1": "yess"}}, "'yess', which is not a label", "did you mean 'yes'?"),
    ],
)
def test_mappings_must_fit_the_job(
    tmp_path: Path, mapping: dict[str, Any], message: str, hint: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "x", "label": "no"})
    with pytest.raises(DataError) as caught:
        read_split(path, make_job(), **mapping)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_one_mapping_serves_the_jobs_of_every_task(tmp_path: Path) -> None:
    """A site has one ``site.toml``, with the columns that all of its jobs ask for."""
    picture(tmp_path / "a.png")
    path = jsonl(tmp_path / "a.jsonl", {"scan": "a.png", "note": "x", "finding": "no", "age": 3})
    columns = {"image": "scan", "text": "note", "label": "finding", "target": "age"}
    columns |= {"tokens": "words", "tags": "marks"}
    rows = read_split(path, make_job(), columns=columns, labels={"none": "no"})
    assert rows.dataset[:] == {"text": ["x"], "label": [0]}
    for task in ("masked-image-modeling", "causal-lm", "image-regression"):
        head = "frozen" if "trained_head" in TASKS[task].refuses else "shared"
        raw = {
            "job": {"name": "test", "task": task},
            "backbone": {"source": "path:/nowhere"},
            "method": {"kind": "lora", "rank": 1, "head": head},
            "data": {"lowest": 0, "highest": 9} if "lowest" in TASKS[task].keys else {},
        }
        job = parse_job(raw, where="test")
        rows = read_split(path, job, columns=columns, labels={"none": "no"})
        assert len(rows.dataset) == 1, task


# Images


def test_image_folders_name_the_labels(tmp_path: Path) -> None:
    for name in ("yes/b.png", "yes/deep/c.jpg", "no/a.png"):
        picture(tmp_path / name)
    write(tmp_path / "no" / ".DS_Store", "litter")
    write(tmp_path / "README.md", "not in a label folder")
    rows = read_split(str(tmp_path), make_job("image"))
    assert rows.dataset[:]["label"] == [0, 1, 1]
    assert rows.dataset[0]["image"].size == (6, 4)
    loose = read_split(str(tmp_path / "*" / "*.png"), make_job("image"))
    assert loose.dataset[:]["label"] == [0, 1]


def test_tables_of_image_paths_are_relative_to_the_table(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", 7)
    path = write(tmp_path / "a.csv", "image,label\nimages/a.png,yes\n")
    rows = read_split(path, make_job("image"))
    assert rows.dataset[0]["image"].getpixel((0, 0)) == 7
    write(tmp_path / "a.csv", "image,label\nimages/b.png,yes\n")
    with pytest.raises(DataError, match="line 2: its cell names no file that is here"):
        read_split(path, make_job("image"))
    write(tmp_path / "a.csv", "image,label\n,yes\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: no image"):
        read_split(path, make_job("image"))


def test_a_broken_image_is_refused_or_skipped_and_counted(tmp_path: Path) -> None:
    picture(tmp_path / "no" / "a.png")
    whole = picture(tmp_path / "yes" / "b.png").read_bytes()
    write(tmp_path / "yes" / "cut.png", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png does not decode") as caught:
        read_split(str(tmp_path), make_job("image"))
    assert 'on_bad_image = "skip"' in caught.value.hint
    rows = read_split(str(tmp_path), make_job("image", on_bad_image="skip"))
    assert (rows.dataset[:]["label"], rows.skipped) == ([0, 1], 1)


def test_only_broken_images_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "no").mkdir()
    write(tmp_path / "no" / "a.png", "text")
    with pytest.raises(DataError, match=r"no image of .* decodes"):
        read_split(str(tmp_path), make_job("image", on_bad_image="skip"))


@pytest.mark.parametrize(
    ("folder", "message", "hint"),
    [("", "no files in label folders", "<label>"), ("cat", "label 'cat'", "labels are no")],
)
def test_bad_image_folders_are_refused(
    tmp_path: Path, folder: str, message: str, hint: str
) -> None:
    picture(tmp_path / folder / "a.png")
    with pytest.raises(DataError) as caught:
        read_split(str(tmp_path), make_job("image"))
    assert message in str(caught.value)
    assert hint in caught.value.hint


# Validation
