"""A change of a file is noticed, also where the file system notes times coarsely."""

import os
import time
from pathlib import Path

import pytest

from fedgraft.common import witness
from fedgraft.common.witness import FRESH, Witness


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times in whole seconds, as on some file systems."""
    fine = witness._signature

    def seconds(path: Path) -> tuple[int, ...] | None:
        found = fine(path)
        return found and (*found[:-2], *(10**9 * (one // 10**9) for one in found[-2:]))

    monkeypatch.setattr(witness, "_signature", seconds)


@pytest.mark.usefixtures("coarse")
def test_two_writes_within_the_time_that_is_noted_differ(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text("1")
    for turn in range(2, 20):
        seen = Witness([file])
        assert seen.holds()
        file.write_text(str(turn % 10))
        assert not seen.holds()


@pytest.mark.usefixtures("coarse")
def test_a_new_name_in_a_folder_counts_at_once(tmp_path: Path) -> None:
    seen = Witness([tmp_path])
    (tmp_path / "new").touch()
    assert not seen.holds()


def test_an_old_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows"
    file.write_text("1")
    now = time.time() + FRESH + 1
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(witness, "hash_file", None)
    seen = Witness([file])
    assert seen.holds()
    os.utime(file, (1, 1))
    assert not seen.holds()


def test_what_is_not_there_counts(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    seen = Witness([file])
    assert seen.holds()
    file.touch()
    assert not seen.holds()
    seen = Witness([file])
    file.unlink()
    assert not seen.holds()
