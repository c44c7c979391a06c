"""What is no data in a site's folders: pipes, and what systems leave there."""

import os
from pathlib import Path

import pytest
from support.federations import digits_job, write_digits
from support.trainings import make_job

from fedgraft.client.data.files import watched
from fedgraft.client.data.folders import LITTER, SPECIAL
from fedgraft.client.data.rows import read_split
from fedgraft.common.errors import DataError


def test_one_in_a_folder_of_images_is_left_out_and_counted(tmp_path: Path) -> None:
    write_digits(tmp_path, 12, 3)
    label = next((tmp_path / "train").iterdir())
    os.mkfifo(label / "pipe.png")
    found = read_split(str(tmp_path / "train"), digits_job())
    assert len(found.dataset) == 12
    assert found.left_out == {SPECIAL: 1}
    assert label / "pipe.png" in watched(str(tmp_path / "train"))  # a file may take its place


def test_one_that_is_named_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="is a pipe") as caught:
        read_split(str(tmp_path / "train.jsonl"), make_job("bert"))
    assert "save the rows as a file" in caught.value.hint


def test_one_that_a_pattern_meets_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "1"}\n')
    os.mkfifo(tmp_path / "b.jsonl")
    assert len(read_split(str(tmp_path / "*.jsonl"), make_job("bert")).dataset) == 1
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="nothing matches"):
        read_split(str(tmp_path / "*.jsonl"), make_job("bert"))


@pytest.mark.parametrize("pattern", ["train/**/*.png", "train/*/*.png", "tra*/*/*.png"])
def test_a_pattern_passes_over_what_systems_leave_and_counts_it(
    pattern: str, tmp_path: Path
) -> None:
    write_digits(tmp_path, 12, 3)
    one = next((tmp_path / "train").rglob("*.png"))
    for folder in ("#recycle", "@eaDir", "__MACOSX"):
        for label in (tmp_path / "train" / folder, tmp_path / "train" / folder / one.parent.name):
            label.mkdir()
            (label / "deleted.png").write_bytes(one.read_bytes())
    found = read_split(str(tmp_path / pattern), digits_job())
    assert len(found.dataset) == 12
    assert found.left_out == {LITTER: 6 if "**" in pattern else 3}


def test_a_folder_that_the_pattern_names_is_data(tmp_path: Path) -> None:
    write_digits(tmp_path, 12, 3)
    (tmp_path / "train").rename(tmp_path / "__train__")
    assert len(read_split(str(tmp_path / "__train__" / "**/*.png"), digits_job()).dataset) == 12


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "label": "1", "label": "2"}',
        '{"text": "a", "text": "b", "label": "1"}',
        '{"text": "a", "label": "1", "caf\u00e9": 1, "cafe\u0301": 2}',
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "label": "1"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2 has a key twice") as caught:
        read_split(str(tmp_path / "rows.jsonl"), make_job("bert"))
    assert "which one is meant" in caught.value.hint


def test_a_value_that_is_mapped_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "label": "1"}\n')
    labels = {"caf\u00e9": "1", "cafe\u0301": "2"}
    with pytest.raises(DataError, match="maps one value twice"):
        read_split(str(tmp_path / "rows.jsonl"), make_job("bert"), labels=labels)
