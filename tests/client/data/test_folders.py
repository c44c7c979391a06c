"""Pipes, sockets and devices in a site's folders: reading one would wait for ever."""

import os
from pathlib import Path

import pytest
from support.federations import digits_job, write_digits
from support.trainings import make_job

from fedgraft.client.data.files import watched
from fedgraft.client.data.folders import SPECIAL
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
