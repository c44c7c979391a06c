"""What is told of a site's data without a job: counts, names of columns, and never a value."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.client.doctor.data_summary import survey

CANARY = "canary-91bd"


def told(place: Path | str, columns: dict[str, str] | None = None) -> tuple[str, str, str]:
    """State, what and hint, none of which has the canary."""
    seen = survey(str(place), columns or {})
    assert CANARY not in repr(seen)
    return seen.state, seen.what, seen.hint


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_and_names_of_columns(tmp_path: Path) -> None:
    path = written(
        tmp_path, "t.csv", f'text,label,age\n"{CANARY}\nsecond line",{CANARY},3\nb,c,4\n'
    )
    assert told(path) == ("ok", "2 rows (text, label, age)", "")


def test_a_glob_is_summed(tmp_path: Path) -> None:
    written(tmp_path, "a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y", "label": 1}\n')
    written(tmp_path, "b.jsonl", '{"text": "x", "label": 1}\n')
    assert told(tmp_path / "*.jsonl") == ("ok", "3 rows (text, label)", "")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": [CANARY, "b"], "label": [CANARY, "d"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert told(tmp_path / "t.parquet") == ("ok", "2 rows (text, label)", "")
    written(tmp_path, "broken.parquet", CANARY)
    assert told(tmp_path / "broken.parquet")[0] == "fail"


def test_a_first_row_is_not_taken_for_names(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", f"{CANARY},yes\nb,no\n")
    state, what, hint = told(path)
    assert (state, what) == ("warn", "1 rows")
    assert "is there a header?" in hint


def test_a_first_row_that_repeats_itself_is_not_told(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", f"{CANARY},{CANARY}\nb,no\n")
    assert told(path)[:2] == ("fail", "cannot be read")


def test_keys_of_jsonl_that_no_job_asks_for_are_not_told(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", f'{{"{CANARY}": "x", "{CANARY}2": 1}}\n')
    assert told(path)[:2] == ("warn", "1 rows")


def test_the_sites_own_names_are_known_by_their_mapping(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", f"q,intent\n{CANARY},x\n")
    columns = {"text": "q", "label": "intent"}
    assert told(path, columns) == ("ok", "1 rows (q, intent)", "")
    state, _, hint = told(path, {"text": "qq", "label": "intent"})
    assert state == "fail"
    assert "no column 'qq'" in hint


def test_rows_that_lack_something_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", f"text,label\n,{CANARY}\n{CANARY},\n{CANARY},x\n")
    state, what, _ = told(path)
    assert (state, what) == ("warn", "3 rows (text, label), 2 of them empty in a column")


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("t.csv", "", "no column has a name"),
        ("t.csv", "text,label\n", "no rows"),
        ("t.csv", f"text,label\n{CANARY}\n", "line 2 has 1 fields, the header has 2"),
        ("t.csv", f'text,label\n"{CANARY}" x,y\n', "line 2 is not valid CSV"),
        ("t.jsonl", f'{{"text": "a", "label": "b"}}\n{{"{CANARY}\n', "line 2 is not valid JSON"),
        ("t.jsonl", f'["{CANARY}"]\n', "is not a JSON object"),
        ("t.jsonl", f"{CANARY}\n", "cannot be read"),
        ("t.jsonl", "3\n", "cannot be read"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, name: str, text: str, hint: str) -> None:
    state, what, said = told(written(tmp_path, name, text))
    assert (state, what) == ("fail", "cannot be read")
    assert hint in said


def test_a_column_twice(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", f"text,label,label\n{CANARY},a,b\n")
    assert "two columns 'label'" in told(path)[2]


def test_many_columns_and_odd_names_stay_one_line(tmp_path: Path) -> None:
    names = ["text", "label", '"a\n\x1b[2J"', *(f"c{number}" for number in range(40))]
    path = written(tmp_path, "t.csv", f"{','.join(names)}\n{','.join('x' * len(names))}\n")
    what = told(path)[1]
    assert what.isprintable()
    assert what.endswith("c16 and 23 more)")


CELL = st.text(max_size=5).map(lambda text: f"{CANARY}{text}")


@given(
    rows=st.lists(st.lists(CELL, min_size=1, max_size=3), min_size=1, max_size=4),
    kind=st.sampled_from([".csv", ".jsonl", ".parquet"]),
    cut=st.integers(0, 12),
)
def test_whatever_a_file_without_names_holds_is_not_told(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], kind: str, cut: int
) -> None:
    path = tmp_path_factory.mktemp("survey") / f"t{kind}"
    lines = [json.dumps(dict.fromkeys(row, row[0])) for row in rows]
    if kind == ".csv":
        lines = [",".join(row) for row in rows]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(content[: max(0, len(content) - cut)])
    assert told(path)[0] in ("warn", "fail")


def test_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"text,label\n\xff\xfe,x\n")
    assert "not UTF-8" in told(path)[2]


def test_images_are_counted_and_their_labels_not_told(tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / "images" / f"{CANARY}-{number}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"")
    assert told(tmp_path / "images") == ("ok", "3 rows", "")
    assert told(tmp_path / "images" / "*" / "*.png") == ("ok", "3 rows", "")


def test_texts_are_counted_and_their_names_not_told(tmp_path: Path) -> None:
    for name in (f"{CANARY}.txt", f"{CANARY}/b.txt", f"{CANARY}/c.TXT", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CANARY)
    assert told(tmp_path) == ("ok", "3 rows", "")
    (tmp_path / "notes.md").write_text("jobs that read texts leave it out")
    assert told(tmp_path) == ("ok", "3 rows", "")
    assert told(tmp_path / f"{CANARY}.txt".replace(CANARY, "*")) == ("ok", "1 rows", "")


def test_images_without_labels_are_counted(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "about.txt").write_text(CANARY)
    assert told(tmp_path) == ("ok", "3 rows", "")


def test_texts_alone_are_what_some_jobs_want(tmp_path: Path) -> None:
    rows = f'{{"text": "{CANARY}", "day": 1}}\n{{"text": "b"}}\n'
    path = written(tmp_path, "t.jsonl", rows)
    assert told(path) == ("ok", "2 rows (text)", "")
    path = written(tmp_path, "t.csv", f"text,{CANARY}\nb,c\n")
    assert told(path) == ("ok", "1 rows (text)", "")
    path = written(tmp_path, "u.csv", f"text,{CANARY}\n,c\n")
    assert told(path)[:2] == ("warn", "1 rows (text), 1 of them empty in a column")
    path = written(tmp_path, "v.csv", f"label,{CANARY}\nb,c\n")
    assert told(path)[:2] == ("warn", "1 rows")  # a content has another name: it must be mapped


def test_what_lies_beside_a_missing_file_is_not_told(tmp_path: Path) -> None:
    (tmp_path / f"{CANARY}-label").mkdir()
    state, what, hint = told(tmp_path / f"{CANARY}-labl".replace(CANARY, "canary-91b"))
    assert (state, what) == ("fail", "is not there")
    assert "mend the path" in hint
    assert told(tmp_path / "*.csv")[0] == "fail"
    (tmp_path / "empty").mkdir()
    assert told(tmp_path / "empty")[0] == "fail"


def test_a_folder_that_is_closed_to_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(self: Path, **more: object) -> bool:
        raise PermissionError(13, "Permission denied", f"{CANARY}")

    monkeypatch.setattr(Path, "exists", closed)
    said = told("/closed/t.csv")
    assert said == ("fail", "cannot be read", "Permission denied: check owner and mode")
