"""The audit: whatever is done to it is found, and whatever kills its writer leaves it whole."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.matrix import tries

from fedgraft.common.errors import AuditError
from fedgraft.common.federation import audit_log as module
from fedgraft.common.federation.audit_log import Audit, AuditHead, read, rows, verify

quick = settings(
    max_examples=tries(80), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LINES = 6


def filled(path: Path, count: int = LINES) -> Audit:
    path.unlink(missing_ok=True)
    audit = Audit(path, clock=lambda: 1.5e9, entropy=bytes)
    for number in range(count):
        audit.append({"what": "é\n" * number, "tensors": [{"name": "a"}, {"name": "b"}]})
    return audit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


def test_a_chain_of_whole_lines_is_right(path: Path) -> None:
    audit = filled(path)
    assert verify(path) == verify(path, audit.head) == LINES
    assert audit.head.lines == LINES and path.stat().st_mode & 0o077 == 0
    lines = list(read(path))
    assert [line["n"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["time"] == "2017-07-14T02:40:00.000+00:00"
    assert lines[1]["previous"] == lines[0]["hash"]
    assert [row["tensors.name"] for row in rows(path)] == ["a", "b"] * LINES


def test_an_empty_audit_has_a_head(path: Path) -> None:
    assert Audit(path).head == AuditHead(0, "0" * 64)
    with pytest.raises(AuditError, match="no audit"):
        verify(path)


def test_equal_facts_have_heads_that_say_nothing(path: Path, tmp_path: Path) -> None:
    clock = lambda: 1.0  # noqa: E731
    first = Audit(path, clock=clock).append({"what": "x"})
    assert Audit(tmp_path / "other", clock=clock).append({"what": "x"}) != first


@pytest.mark.parametrize("name", ["n", "time", "salt", "previous", "hash"])
def test_facts_do_not_replace_the_chain(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Audit(path).append({name: 1})
    assert path.read_bytes() == b""


# What somebody does to it


@quick
@given(data=st.data())
def test_any_byte_that_is_changed_is_found(path: Path, data: st.DataObject) -> None:
    head = filled(path).head
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    number = path_line(bytes(content), place)
    with pytest.raises(AuditError) as caught:
        verify(path, head)
    # A line end that is gone makes its line one with the next.
    assert f"line {number} " in str(caught.value) or f"line {number + 1} " in str(caught.value)


def path_line(content: bytes, place: int) -> int:
    return content[:place].count(b"\n") + 1


@quick
@given(
    kind=st.sampled_from(["delete", "swap", "repeat", "insert"]),
    one=st.integers(0, LINES - 1),
    two=st.integers(0, LINES - 1),
)
def test_lines_that_are_removed_moved_or_added_are_found(
    path: Path, kind: str, one: int, two: int
) -> None:
    head = filled(path).head
    lines = path.read_bytes().splitlines(keepends=True)
    before = list(lines)
    if kind == "delete":
        del lines[one]
    elif kind == "swap":
        lines[one], lines[two] = lines[two], lines[one]
    elif kind == "repeat":
        lines.insert(two, lines[one])
    else:
        lines.insert(one, b'{"n":1}\n')
    path.write_bytes(b"".join(lines))
    if lines == before:
        assert verify(path, head) == LINES
        return
    with pytest.raises(AuditError):
        verify(path, head)


@pytest.mark.parametrize("left", range(LINES))
def test_an_end_that_is_cut_off_is_found_by_who_knows_the_head(path: Path, left: int) -> None:
    head = filled(path).head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:left]))
    assert verify(path) == left  # nothing in the file itself can say so
    with pytest.raises(AuditError, match="lines were removed"):
        verify(path, head)


def test_a_chain_written_anew_is_found_by_who_knows_a_head(path: Path) -> None:
    known = filled(path, 3).head
    path.unlink()
    for number in range(5):
        Audit(path).append({"what": number})
    assert verify(path) == 5
    with pytest.raises(AuditError, match=r"line 3 of .* is not the one that is known"):
        verify(path, known)


@pytest.mark.parametrize("end", [b"\n", b"{}\n", b"torn", b'{"n":9,', b"\x00" * 40])
def test_nothing_is_chained_to_what_is_no_line_of_ours(path: Path, end: bytes) -> None:
    audit = filled(path)
    path.write_bytes(path.read_bytes() + end)
    before = path.read_bytes()
    with pytest.raises(AuditError):
        audit.append({"what": "more"})
    with pytest.raises(AuditError):
        _ = audit.head
    assert path.read_bytes() == before


# What kills its writer


@quick
@given(data=st.data())
def test_a_torn_line_is_cut_and_nothing_else(path: Path, data: st.DataObject) -> None:
    audit = filled(path)
    whole = path.read_bytes()
    audit.append({"what": "torn", "tensors": []})
    torn = path.read_bytes()
    cut = data.draw(st.integers(len(whole), len(torn) - 1))
    path.write_bytes(torn[:cut])
    if cut > len(whole):
        with pytest.raises(AuditError, match=rf"line {LINES + 1} of .* is not finished"):
            verify(path)
    audit.append({"what": "next"})
    kept = LINES + (cut == len(torn) - 1)  # only its line end was lacking: it is kept
    assert verify(path, audit.head) == kept + 1
    assert path.read_bytes().startswith(whole)


def test_a_writer_that_is_killed_leaves_a_chain(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from fedgraft.common.federation.audit_log import Audit\n"
        "audit = Audit(Path(sys.argv[1]))\n"
        "while True:\n"
        "    print(audit.append({'what': 'x' * 30000}).lines, flush=True)\n"
    )
    known = 0
    for _ in range(4):
        arguments = [sys.executable, "-c", program, str(path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as writer:
            assert writer.stdout is not None
            first = int(writer.stdout.readline())
            assert first > known
            time.sleep(0.05)
            os.kill(writer.pid, signal.SIGKILL)
            told = [int(line) for line in writer.stdout.read().split(b"\n") if line]
        known = max([first, *told])
        Audit(path).append({"what": "after"})
        assert verify(path) >= known + 1
        known = verify(path)


def append_many(path: Path, name: str) -> None:
    for number in range(40):
        Audit(path).append({"who": name, "number": number})


def test_two_processes_share_a_chain(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert verify(path) == 80
    for name in "ab":
        assert [line["number"] for line in read(path) if line["who"] == name] == list(range(40))


# Disks


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_leaves_the_chain_as_it_was(
    path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = filled(path)
    before, write = path.read_bytes(), module._write

    def full(file: Any, content: bytes, start: int) -> None:
        write(file, content[:written], start)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(AuditError, match="cannot be written: No space left") as caught:
        audit.append({"what": "more"})
    assert caught.value.hint
    assert path.read_bytes() == before
    monkeypatch.undo()
    audit.append({"what": "more"})
    assert verify(path) == LINES + 1


def append_without_room(path: Path, room: int) -> None:
    limit = path.stat().st_size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the kernel writes what fits
    with pytest.raises(AuditError, match="cannot be written: File too large"):
        Audit(path).append({"what": "x" * 1000})


@pytest.mark.parametrize("room", [0, 1, 200])
def test_a_write_that_the_kernel_cuts_short_leaves_the_chain_as_it_was(
    path: Path, room: int
) -> None:
    audit = filled(path)
    before = path.read_bytes()
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=append_without_room, args=(path, room))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert path.read_bytes() == before
    audit.append({"what": "more"})
    assert verify(path) == LINES + 1


def test_a_folder_in_the_way_is_an_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(AuditError, match="cannot be written"):
        Audit(path).append({"what": "x"})


def test_a_big_file_is_checked_line_by_line(path: Path) -> None:
    import tracemalloc

    audit = Audit(path)
    for _ in range(200):
        audit.append({"what": "x" * 50_000})
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    assert verify(path) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000
    assert json.loads(path.read_bytes().splitlines()[-1])["n"] == 200
