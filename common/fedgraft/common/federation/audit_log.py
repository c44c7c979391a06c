"""A file that only grows; the hash in every line covers all lines before it.

A line is JSON: ``n`` (from 1), ``time`` (UTC), a random ``salt``, the hash of the ``previous``
line, the facts, and last the SHA-256 ``hash`` of the line's own bytes up to there. A party that
knows the newest hash, the head, detects every byte before it that was changed, removed, moved or
added. Without the newest hash nobody can detect a chain that was completely rewritten. So another
party should keep the head. Because of the salts, a head says nothing about the facts.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from fedgraft.common.errors import AuditError
from fedgraft.common.files import sync_folder

__all__ = ["Audit", "AuditHead", "read", "rows", "verify"]

NOTHING = "0" * 64  # the hash before the first line
LONGEST = 1 << 24  # bytes of a line
BLOCK = 1 << 16
CHANGED = "keep it as evidence, move it away, and find out who changed it"
LINE = re.compile(
    rb'(\{"n":([1-9]\d*),"time":"[^"]+","salt":"[0-9a-f]{32}","previous":"([0-9a-f]{64})".*)'
    rb',"hash":"([0-9a-f]{64})"\}',
    re.DOTALL,
)


@dataclass(frozen=True)
class AuditHead:
    """The end of a chain: the number of its lines, and the hash of the last line."""

    lines: int
    hash: str


class Audit:
    """The audit at ``path``; several processes may write it at once."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.path = path
        self._clock, self._entropy = clock, entropy

    @property
    def head(self) -> AuditHead:
        """Return the end of the chain on disk.

        Raises:
            AuditError: the file cannot be read, or its last line is not a line of an audit.
        """
        if not self.path.exists():
            return AuditHead(0, NOTHING)
        with _locked(self.path, "rb") as file:
            return _settled(self.path, file)[0]

    @property
    def newest(self) -> tuple[AuditHead, dict[str, Any]]:
        """Return ``head`` and the facts of the last line; the facts are {} if there is no line.

        Raises:
            AuditError: as ``head``.
        """
        before: list[bytes] = []
        if self.path.exists():
            with _locked(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                *before, _ = _tail(file, size)  # what follows the last line end is no line yet
        if not before:
            return AuditHead(0, NOTHING), {}
        return _head_of(self.path, before[-1]), json.loads(before[-1])

    def append(self, facts: Mapping[str, Any]) -> AuditHead:
        """Add a line and return the new head; the line is durable when the function returns.

        ``facts`` are JSON and have none of the chain's own keys. An unfinished last line is cut
        off before.

        Raises:
            AuditError: the line cannot be written, or the line before it was changed.
        """
        with _locked(self.path, "r+b") as file:
            head, end, lacking = _settled(self.path, file)
            line, new = _sealed(head, dict(facts), self._clock(), self._entropy(16))
            file.truncate(end)
            try:
                _write(file, lacking + line, end)
            except OSError:
                file.truncate(end)  # no part of a line that could not be written
                raise
        return new


def _sealed(
    head: AuditHead, facts: dict[str, Any], seconds: float, salt: bytes
) -> tuple[bytes, AuditHead]:
    """Return the line after ``head``, and the new head."""
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    chain = {"n": head.lines + 1, "time": moment, "salt": salt.hex(), "previous": head.hash}
    if taken := facts.keys() & {*chain, "hash"}:
        raise ValueError(f"facts may not be named {min(taken)}")
    body = json.dumps(chain | facts, separators=(",", ":"), allow_nan=False).encode()[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + f',"hash":"{digest}"}}\n'.encode(), AuditHead(head.lines + 1, digest)


def _write(file: IO[bytes], content: bytes, start: int) -> None:
    """Write ``content`` at ``start`` of an unbuffered file, durably."""
    file.seek(start)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def _settled(path: Path, file: IO[bytes]) -> tuple[AuditHead, int, bytes]:
    """Return the head of an open file, the place of the next line, and the bytes missing before it.

    Bytes after the last line end are an unfinished line of a process that died. The start of a
    valid next line is cut off; anything else is an error.
    """
    size = file.seek(0, os.SEEK_END)
    *before, torn = _tail(file, size)
    head = _head_of(path, before[-1]) if before else AuditHead(0, NOTHING)
    if not torn:
        return head, size, b""
    if (whole := _follows(torn, head)) is not None:  # only its line end is lacking
        return whole, size, b"\n"
    begins = f'{{"n":{head.lines + 1},'.encode()
    if not (torn.startswith(begins) or begins.startswith(torn)):
        raise AuditError(f"{path} does not end in a line of an audit", hint=CHANGED)
    return head, size - len(torn), b""


def _tail(file: IO[bytes], size: int) -> list[bytes]:
    """Return the last line of a file, if it has one, and the bytes after its end."""
    found, start = b"", size
    while start and found.count(b"\n") < 2:
        step = min(BLOCK, start)
        start -= step
        file.seek(start)
        found = file.read(step) + found
    return found.split(b"\n")[-2:]


def _head_of(path: Path, line: bytes) -> AuditHead:
    """Return the head that follows from the last line alone."""
    chain = _chain(line)
    if chain is None:
        raise AuditError(f"the last line of {path} was changed", hint=CHANGED)
    return chain[1]


def _chain(line: bytes) -> tuple[str, AuditHead] | None:
    """Return the previous hash in a line, and the head after it; None if the line was changed."""
    found = LINE.fullmatch(line)
    if found is None or hashlib.sha256(found[1]).hexdigest() != found[4].decode():
        return None
    return found[3].decode(), AuditHead(int(found[2]), found[4].decode())


def _follows(line: bytes, before: AuditHead) -> AuditHead | None:
    """Return the head after a line that follows ``before``; None if it does not follow."""
    chain = _chain(line)
    if chain is None or chain[0] != before.hash or chain[1].lines != before.lines + 1:
        return None
    return chain[1]


@contextmanager
def _locked(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """Yield the file, locked for one writer or for readers; a writer creates a missing file."""
    writes = "+" in mode
    try:
        if writes and not path.exists():
            _make(path)
        with path.open(mode, buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX if writes else fcntl.LOCK_SH)
            yield file
    except OSError as error:
        what = "written" if writes else "read"
        raise AuditError(
            f"{path} cannot be {what}: {error.strerror}", hint="check the disk and the folder"
        ) from None


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    sync_folder(path.parent)  # a new file must survive a power cut too


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all lines in order; each is checked first, and only one is in memory.

    Raises:
        AuditError: the first line that does not follow from the line before.
    """
    if not path.exists():
        raise AuditError(
            f"no audit {path}", hint="a site with a policy has one after its first job"
        )
    with _locked(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size  # what comes later is for the next reader
    head = AuditHead(0, NOTHING)
    with path.open("rb") as file:
        while left > 0:
            line = file.readline(min(left, LONGEST))
            left -= len(line)
            head = _checked(path, line, head)
            yield json.loads(line)


def _checked(path: Path, line: bytes, before: AuditHead) -> AuditHead:
    """Return the head after ``line``, which must follow ``before``."""
    number = before.lines + 1
    if not line.endswith(b"\n"):
        raise AuditError(
            f"line {number} of {path} is not finished",
            hint="if its writer was killed, the next message mends that: look again then",
        )
    head = _follows(line[:-1], before)
    if head is None:
        raise AuditError(
            f"line {number} of {path} does not follow from the lines before it: it was changed, "
            "removed or moved, or one was put before it",
            hint=CHANGED,
        )
    return head


def verify(path: Path, known: AuditHead | None = None) -> int:
    """Check the whole chain, in constant memory, and return the number of its lines.

    ``known`` is a head that another party kept: the chain must contain it.

    Raises:
        AuditError: the first bad line, or the chain does not reach or match ``known``.
    """
    lines = 0
    for lines, facts in enumerate(read(path), 1):
        if known is not None and lines == known.lines and facts["hash"] != known.hash:
            raise AuditError(f"line {lines} of {path} is not the one that is known", hint=CHANGED)
    if known is not None and lines < known.lines:
        raise AuditError(
            f"{path} ends at line {lines}, and line {known.lines} is known: lines were removed",
            hint=CHANGED,
        )
    return lines


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines as flat rows: one for each entry of a list of tables, such as the tensors.

    Raises:
        AuditError: as ``read``.
    """
    for facts in read(path):
        tables = {key: value for key, value in facts.items() if isinstance(value, list)}
        plain = {key: value for key, value in facts.items() if key not in tables}
        entries = [(key, entry) for key, value in tables.items() for entry in value]
        for key, entry in entries:
            yield plain | {f"{key}.{name}": value for name, value in entry.items()}
        if not entries:
            yield plain
