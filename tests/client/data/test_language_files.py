"""Texts to be predicted, out of files of every kind, and what is wrong with files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.language_models import job_settings

from fedgraft.client.data.rows import read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import DataError


def make_job(kind: str = "gpt2", **data: Any) -> Job:
    return parse_job(job_settings(kind, Path("nowhere"), "-", **data), where="test")


def texts_at(path: Path, **data: Any) -> list[str]:
    rows = read_split(str(path), make_job(**data)).dataset
    assert set(rows[:]["label"]) == {0}
    return list(rows[:]["text"])


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffto be,\nor not\n".encode())
    assert texts_at(tmp_path / "a.txt") == ["to be,\nor not\n"]


def test_a_folder_has_a_document_a_file(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.TXT", ".hidden.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_at(tmp_path) == ["a.txt", "b/1.TXT", "b/2.txt"]
    left_out = read_split(str(tmp_path), make_job()).left_out
    assert left_out == {"files of the system": 1, "files that are no .txt files": 1}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_has_a_document_a_row(suffix: str, tmp_path: Path) -> None:
    path, texts = tmp_path / f"t.{suffix}", ["to be", "or, not"]
    if suffix == "csv":
        path.write_text('letter,day\nto be,1\n"or, not",2\n')
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"letter": text}) + "\n" for text in texts))
    else:
        parquet.write_table(pa.table({"letter": texts}), path)
    assert texts_at(path, text="letter") == texts


def test_a_pattern_reads_all_it_matches(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts_at(tmp_path / "*.txt") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "", "line 1: no text"),
        ("a.txt", " \n\t\n", "line 1: no text"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text\n", "has no rows"),
        ("a.csv", "Texts,day\nto be,1\n", "no column 'text'"),
        ("a.jsonl", '{"body": "to be"}\n', "no column 'text'"),
        ("a.jsonl", '{"text": "to be"}\n{"text": ""}\n', "line 2: no text"),
        ("a.jsonl", '{"text": 7}\n', "the text is a int"),
        ("a.docx", "to be", "not a kind of file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_a_hint(
    name: str, content: str | bytes, told: str, tmp_path: Path
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=told) as caught:
        read_split(str(tmp_path / name), make_job())
    assert caught.value.hint
    assert "to be" not in f"{caught.value} {caught.value.hint}", "a row's text is repeated"


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("to be")
    with pytest.raises(DataError, match=r"no \.txt files") as caught:
        read_split(str(tmp_path), make_job())
    assert caught.value.hint


def test_a_mapping_that_no_job_asks_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("letter\nto be\n")
    with pytest.raises(DataError, match="which no job asks for"):
        read_split(str(tmp_path / "a.csv"), make_job(), columns={"labell": "letter"})
    rows = read_split(str(tmp_path / "a.csv"), make_job(), columns={"text": "letter"})
    assert rows.dataset[:]["text"] == ["to be"]


def test_a_classification_does_not_read_txt_files(tmp_path: Path) -> None:
    raw = job_settings("gpt2", Path("nowhere"), "-")
    raw["job"] = {"name": "c", "task": "text-classification", "labels": ["a", "b"]}
    (tmp_path / "a.txt").write_text("to be")
    with pytest.raises(DataError, match="not a kind of file"):
        read_split(str(tmp_path / "a.txt"), parse_job(raw, where="test"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "to be", "target": ""}, "line 1: no target"),
        ({"text": "to be", "target": None}, "line 1: no target"),
        ({"text": "to be", "target": 3}, "the target is a int"),
        ({"text": "to be"}, "no column 'target'"),
    ],
)
def test_a_pair_wants_both_texts(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=told) as caught:
        read_split(str(path), make_job("t5"))
    assert caught.value.hint


def test_pairs_are_read_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("en,de\nyes,ja\nno,nein\n")
    rows = read_split(str(path), make_job("t5", text="en", target="de")).dataset
    assert (rows[:]["text"], rows[:]["target"]) == (["yes", "no"], ["ja", "nein"])
