"""A file is there whole or not at all, whatever happens while it is written."""

import os
from pathlib import Path

import pytest

from fedgraft.common.files import write_atomically, write_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with old content, alone in its folder."""
    file = tmp_path / "state.json"
    file.write_text("old")
    return file


def only_file_in(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_new_content_replaces_the_old_and_nothing_else_stays(path: Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))
    assert only_file_in(path.parent).read_bytes() == b"new"


def test_a_new_file_is_made(tmp_path: Path) -> None:
    write_text(tmp_path / "new.txt", "x")
    assert only_file_in(tmp_path) == tmp_path / "new.txt"


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, SystemExit])
def test_a_write_that_fails_half_way_leaves_the_old_file(
    path: Path, error: type[BaseException]
) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert only_file_in(path.parent) == path
    assert path.read_text() == "old"


def test_a_write_that_fails_at_once_or_writes_nothing_leaves_the_old_file(path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    with pytest.raises(FileNotFoundError):
        write_atomically(path, lambda _: None)
    assert only_file_in(path.parent).read_text() == "old"


def test_a_failed_write_of_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "new", write)
    assert list(tmp_path.iterdir()) == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(path: Path) -> None:
    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent  # a rename across file systems would copy
        assert temporary.name.startswith(".")
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole"


def test_content_and_then_the_rename_are_flushed_to_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, str]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, path.read_text()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "new")
    assert flushed == [(path.stat().st_ino, "old"), (path.parent.stat().st_ino, "new")]


def test_no_descriptor_is_left_open(path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        write_text(path, "new")
    assert len(os.listdir("/proc/self/fd")) == before


def test_text_is_utf8_whatever_the_locale(path: Path) -> None:
    write_text(path, "größe\n")
    assert path.read_bytes() == "größe\n".encode()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "x", "x")
