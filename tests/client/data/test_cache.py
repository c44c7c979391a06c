"""What is kept stays within its budgets, and losing any of it costs time and nothing else."""

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.matrix import tries

from fedgraft.client.data import cache as store_module
from fedgraft.client.data.cache import LARGEST_SHARE, WORTH_A_FILE, Arrays, Files, Recent, Store

WORTH = WORTH_A_FILE  # the smallest thing that gets a file
HEADER = 200  # bytes that a file has beside its arrays, or more than that


def bytes_of(size: int, fill: int = 1) -> Arrays:
    return Arrays({"a": np.full(size, fill, np.uint8)})


def kept(folder: Path) -> set[str]:
    return {path.name.split(".")[0] for path in folder.iterdir()}


def dated(folder: Path, *keys: str) -> None:
    """Let the files of these keys be old, the first the oldest."""
    for age, key in enumerate(keys):
        (path,) = folder.glob(f"{key}.*")
        os.utime(path, (1000 + age, 1000 + age))


# In memory


@given(
    budget=st.integers(0, 50),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 30)), max_size=40),
)
def test_memory_holds_what_was_used_last(budget: int, steps: list[tuple[bool, int, int]]) -> None:
    recent: Recent[Arrays] = Recent(budget)
    model: list[tuple[str, int]] = []  # what was used longest ago first
    for adds, number, size in steps:
        key = str(number)
        known = [one for one in model if one[0] == key]
        found = recent.get(key)
        assert (found is not None) == bool(known)
        if known:
            assert found is not None and found.nbytes == known[0][1]
            model.remove(known[0])
            model.append(known[0])
        elif adds:
            recent.add(key, bytes_of(size))
            model.append((key, size))
            while sum(one[1] for one in model) > budget and len(model) > 1:
                model.pop(0)
    held = {str(n) for n in range(10) if recent.get(str(n)) is not None}
    assert held == {key for key, _ in model}


def test_the_newest_stays_however_large_it_is() -> None:
    recent: Recent[Arrays] = Recent(10)
    recent.add("small", bytes_of(5))
    recent.add("large", bytes_of(500))
    assert recent.get("large") is not None and recent.get("small") is None
    recent.add("small", bytes_of(5))
    assert recent.get("large") is None and recent.get("small") is not None


def test_what_is_used_again_outlives_what_is_not() -> None:
    recent: Recent[Arrays] = Recent(30)
    for key in "abc":
        recent.add(key, bytes_of(10))
    recent.get("a")
    recent.add("d", bytes_of(10))
    assert [key for key in "abcd" if recent.get(key)] == ["a", "c", "d"]


# In files


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.float32])
def test_what_is_saved_is_loaded_by_any_process(tmp_path: Path, dtype: Any) -> None:
    values = np.random.default_rng(1).integers(0, 99, (5, 4000, 4)).astype(dtype)
    arrays = Arrays({"hidden": values, "more": np.arange(3)})
    Files(tmp_path / "new", 10**9).save("k", arrays)
    found = Files(tmp_path / "new", 10**9).load("k")
    assert found is not None and sorted(found) == ["hidden", "more"]
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)
    assert (found["hidden"].dtype, found["hidden"].shape) == (values.dtype, values.shape)
    assert Files(tmp_path / "new", 10**9).load("other") is None
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0  # what sites' rows say: for them alone


def test_only_what_is_worth_a_file_and_fits_gets_one(tmp_path: Path) -> None:
    files = Files(tmp_path, 2 * WORTH)
    files.save("small", bytes_of(WORTH - 1))
    files.save("large", bytes_of(2 * WORTH + 1))
    assert kept(tmp_path) == set()
    files.save("right", bytes_of(WORTH))
    assert kept(tmp_path) == {"right"}


@given(
    budget=st.integers(0, 12),
    sizes=st.lists(st.integers(1, 5), max_size=12),
    fresh=st.booleans(),
)
@limits(max_examples=tries(30), deadline=None)
def test_files_stay_within_their_budget(budget: int, sizes: list[int], fresh: bool) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = Files(folder, budget * WORTH)
        for number, size in enumerate(sizes):
            if fresh:  # another process, which has not seen the earlier files
                files = Files(folder, budget * WORTH)
            files.save(f"k{number}", bytes_of(size * WORTH))
            total = sum(path.stat().st_size for path in folder.iterdir())
            assert total <= budget * WORTH + HEADER * (number + 1)
            assert (f"k{number}" in kept(folder)) == (size <= budget)


def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    files = Files(tmp_path, 4 * WORTH + 4 * HEADER)
    for key in "abcd":
        files.save(key, bytes_of(WORTH))
    dated(tmp_path, "c", "a", "d", "b")
    files.load("c")  # now it is the one used last
    files.save("e", bytes_of(WORTH))
    assert "a" not in kept(tmp_path) and kept(tmp_path) >= {"b", "c", "e"}


def test_what_others_keep_in_the_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "report.safetensors").write_bytes(bytes(50 * WORTH))
    (tmp_path / "notes.txt").write_text("mine")
    files = Files(tmp_path, 2 * WORTH)
    for key in "abcdef":
        files.save(key, bytes_of(WORTH))
    assert kept(tmp_path) >= {"report", "notes", "f"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 5000)


def vanish(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [cut, empty, scramble, vanish, become_a_folder])
def test_a_file_that_is_damaged_or_gone_is_made_again(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    Files(tmp_path, 10**9).save("k", bytes_of(WORTH))
    (path,) = tmp_path.iterdir()
    spoil(path)
    assert Files(tmp_path, 10**9).load("k") is None
    store = Store(tmp_path, memory=10**9, disk=10**9)
    assert store.get("k", lambda: bytes_of(WORTH, 7))["a"][0] == 7
    if path.is_file():
        again = Files(tmp_path, 10**9).load("k")
        assert again is not None and again["a"][0] == 7


def test_a_file_that_vanishes_while_others_are_counted_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes room at the same time."""
    Files(tmp_path, 10**9).save("gone", bytes_of(WORTH))
    (path,) = tmp_path.iterdir()
    found = list(os.scandir(tmp_path))
    path.unlink()
    monkeypatch.setattr(os, "scandir", lambda folder: found)
    files = Files(tmp_path, 2 * WORTH)
    files.save("k", bytes_of(WORTH))
    assert files.load("k") is not None


# Bad luck


def _save_and_die(folder: Path, written: int) -> None:
    """Be killed when so many bytes of the file are written."""

    def write(arrays: Arrays, path: Path) -> None:
        save_file(arrays, path)
        with path.open("r+b") as file:
            file.truncate(written)
        os.kill(os.getpid(), signal.SIGKILL)

    pytest.MonkeyPatch().setattr(store_module, "save_file", write)
    Files(folder, 10**9).save("k", bytes_of(WORTH))


@pytest.mark.parametrize("written", [0, 100, WORTH])
def test_nothing_half_written_is_found_after_a_kill(tmp_path: Path, written: int) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_save_and_die, args=(tmp_path, written))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    files = Files(tmp_path, 10**9)
    assert files.load("k") is None
    files.save("k", bytes_of(WORTH))
    assert files.load("k") is not None


def _save_on_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WORTH // 2, WORTH // 2))
    store = Store(folder, memory=10**9, disk=10**9)
    made = store.get("k", lambda: bytes_of(WORTH, 3))
    assert made["a"][0] == 3
    assert store.get("k", _must_not_run) is made
    assert list(folder.iterdir()) == []


def test_a_full_disk_costs_nothing_but_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_save_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("what", ["mkdir", "replace"])
def test_a_disk_that_fails_costs_nothing_but_the_file(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, what, fail)
    store = Store(tmp_path / "new", memory=10**9, disk=10**9)
    assert store.get("k", lambda: bytes_of(WORTH, 3))["a"][0] == 3


# Pages of a file


def filling(value: int, calls: list[int]) -> Callable[[Any], None]:
    def fill(array: Any) -> None:
        calls.append(value)
        array[:] = value

    return fill


def test_a_large_array_is_made_once_and_mapped(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        array = Files(tmp_path, 10**6).mapped("k", (4, 500), np.float32, filling(5, calls))
        assert isinstance(array, np.memmap) and array.shape == (4, 500) and array.dtype == "f4"
        assert (array == 5).all() and not array.flags.writeable
    assert calls == [5]
    assert Files(tmp_path, 10**6).mapped("k", (4, 10**6), np.float32, filling(6, calls)) is None
    assert Files(tmp_path, 0).mapped("other", (1,), np.uint8, filling(6, calls)) is None
    assert calls == [5]


def test_mapped_arrays_count_in_the_budget(tmp_path: Path) -> None:
    files = Files(tmp_path, 3 * WORTH + 3 * HEADER)
    for key in "ab":
        files.mapped(key, (WORTH,), np.uint8, filling(1, []))
    files.save("c", bytes_of(WORTH))
    dated(tmp_path, "b", "a", "c")
    files.mapped("b", (WORTH,), np.uint8, filling(1, []))  # used again
    files.mapped("d", (WORTH,), np.uint8, filling(1, []))
    assert "a" not in kept(tmp_path) and kept(tmp_path) >= {"b", "d"}


@pytest.mark.parametrize("spoil", [cut, empty, scramble, vanish])
def test_a_mapped_file_that_is_damaged_or_gone_is_made_again(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    Files(tmp_path, 10**6).mapped("k", (4, 500), np.float32, filling(5, []))
    (path,) = tmp_path.iterdir()
    spoil(path)
    array = Files(tmp_path, 10**6).mapped("k", (4, 500), np.float32, filling(6, []))
    assert array is not None and (array == 6).all()


def test_an_array_whose_making_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail(array: Any) -> None:
        array[:1] = 9
        raise KeyError

    files = Files(tmp_path, 10**6)
    with pytest.raises(KeyError):
        files.mapped("k", (100,), np.uint8, fail)
    assert list(tmp_path.iterdir()) == []


# Both


def _must_not_run() -> Arrays:
    raise AssertionError("made again")


def test_what_is_kept_is_made_once(tmp_path: Path) -> None:
    store = Store(tmp_path, memory=100 * WORTH, disk=10**9)
    made = store.get("k", lambda: bytes_of(WORTH))
    assert store.get("k", _must_not_run) is made
    read = Store(tmp_path, memory=100 * WORTH, disk=10**9).get("k", _must_not_run)
    assert read["a"].tobytes() == made["a"].tobytes()
    (path,) = tmp_path.iterdir()
    path.unlink()
    assert store.get("k", _must_not_run) is made  # it is in memory, too


def test_what_is_too_large_for_memory_is_read_each_time(tmp_path: Path) -> None:
    memory = 2 * LARGEST_SHARE * WORTH
    store = Store(tmp_path, memory=memory, disk=10**9)
    assert store.fits(WORTH) and not store.fits(WORTH + 1)
    store.get("right", lambda: bytes_of(WORTH))
    store.get("large", lambda: bytes_of(WORTH + 1))
    assert store.recent.get("right") is not None and store.recent.get("large") is None
    store.get("large", _must_not_run)


def test_memory_lets_go_and_the_file_is_still_there(tmp_path: Path) -> None:
    store = Store(tmp_path, memory=2 * LARGEST_SHARE * WORTH, disk=10**9)
    for number in range(3 * LARGEST_SHARE):
        store.get(f"k{number}", lambda: bytes_of(WORTH))
    assert store.recent.get("k0") is None
    store.get("k0", _must_not_run)
    assert store.recent.get("k0") is not None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), max_size=25))
@limits(max_examples=tries(30), deadline=None)
def test_a_store_gives_what_making_it_would_give(steps: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(folder, memory=30 * WORTH, disk=6 * WORTH)
        for number, size in steps:
            key = f"{number}-{size}"
            found = store.get(key, lambda n=number, s=size: bytes_of(s * WORTH, n))  # type: ignore[misc]
            assert found["a"].tobytes() == bytes_of(size * WORTH, number)["a"].tobytes()


def test_forked_processes_share_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path, memory=100 * WORTH, disk=10**9)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=store.get, args=("k", _make_it))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert store.recent.get("k") is None
    assert store.get("k", _must_not_run)["a"][0] == 9


def _make_it() -> Arrays:
    return bytes_of(WORTH, 9)
