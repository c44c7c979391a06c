"""A change of a file is noticed, also where the file system notes times coarsely."""

import os
import time
from pathlib import Path

import pytest

from fedgraft.common import witness
from fedgraft.common.files import hash_file
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


def test_a_file_that_changes_while_it_is_compared_is_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large file takes longer than it stays fresh; its times are noted coarsely."""
    file, now, read = tmp_path / "rows", time.time(), hash_file
    file.write_text("1")
    monkeypatch.setattr(witness, "_signature", lambda path: (1, 1, 1, 1, int(now * 10**9)))
    seen = Witness([file])

    def slow(path: Path) -> str:
        found = read(path)
        path.write_text("2")
        monkeypatch.setattr(time, "time", lambda: now + FRESH + 1)
        return found

    with monkeypatch.context() as during:
        during.setattr(witness, "hash_file", slow)
        assert seen.holds()
    assert not seen.holds()


def test_a_change_that_hides_its_time_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cp -p` and rsync set the time of the content; nobody sets the time of the change."""
    file = tmp_path / "rows"
    file.write_text("1")
    facts = file.stat()
    monkeypatch.setattr(witness, "FRESH", -1.0)
    seen = Witness([file])
    assert seen.holds()
    time.sleep(0.02)
    file.write_text("2")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert not seen.holds()


def test_what_was_read_before_holds_only_if_it_is_older(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_text("1")
    assert not Witness([file], since=time.time() - 5).holds()
    changed = file.stat().st_ctime
    assert Witness([file], since=changed + 1).holds()
    assert Witness([tmp_path / "none"], since=changed - 5).holds()


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    seen = Witness([tmp_path / "pipe"])
    assert seen.holds()
    (tmp_path / "pipe").unlink()
    assert not seen.holds()
