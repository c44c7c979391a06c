"""The folder of a run: its job, events, metrics, trusted checkpoints and result.

    run.json            id, session, versions                 written once
    job.toml            the resolved job                      written once
    environment.json    versions and machine                  written once
    events.jsonl        events, appended
    metrics.jsonl       one line per round, appended before the round's checkpoint
    masked_rounds       the number of masked rounds begun, with secure aggregation
    checkpoints/        round-000007.<sha256>.safetensors, the last two; partial.<sha256>... of an
                        unfinished round
    adapter/            the final adapter in PEFT format

On resume, metrics of rounds after the checkpoint are cut off, because those rounds are repeated.
This module does not need torch, so that commands that only read runs start quickly.
"""

import json
import os
import platform
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.errors import InputError, RunError
from fedgraft.common.files import lock_folder, write_text
from fedgraft.server.runs.checkpoints import (
    load_newest,
    load_partial,
    save_checkpoint,
    save_partial,
)
from fedgraft.server.state import Dropped, Partial, RoundRecord, State

if TYPE_CHECKING:
    from fedgraft.common.layout import Layout

__all__ = ["WAITING", "Run", "list_runs"]

CHECKPOINTS = "checkpoints"
WAITING = "waiting"  # the event of a run that stopped until something that it needs is there
NONE: Mapping[str, str] = MappingProxyType({})
PACKAGES = ("fedgraft", "flwr", "torch", "transformers", "peft", "datasets", "numpy")


class Run:
    """One execution of a job. Use it as a context manager, which locks the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            job = tomllib.loads((folder / "job.toml").read_text(encoding="utf-8"))
            self.session, self.created = str(facts["session"]), str(facts["created"])
            self.inputs: dict[str, str] = dict(facts["inputs"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{folder} is not the folder of a run", hint="`fedgraft runs` lists them"
            ) from None
        self.job = parse_job(job, where=str(folder / "job.toml"))
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, parent: Path, job: Job, inputs: Mapping[str, str] = NONE) -> Self:
        """Create a new run of ``job`` in a new folder below ``parent``, and return it.

        ``inputs`` are hashes, by name, of the data that the job reads. A resumed run must find the
        same hashes.

        Raises:
            InputError: the folder cannot be written.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        return cls._write(parent / f"{job.job.name}-{stamp}-{secrets.token_hex(2)}", job, inputs)

    @classmethod
    def open_or_create(cls, folder: Path, job: Job) -> Self:
        """Return the run in ``folder``, or a new run there if the folder has none."""
        return cls(folder) if (folder / "run.json").exists() else cls._write(folder, job, NONE)

    @classmethod
    def _write(cls, folder: Path, job: Job, inputs: Mapping[str, str]) -> Self:
        facts = {
            "run": folder.name,
            "session": secrets.token_hex(16),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": dict(inputs),
        }
        try:
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            write_text(folder / "job.toml", dump_job(job))
            write_text(folder / "environment.json", json.dumps(_environment(), indent=1))
            # run.json comes last, so that a folder with a run.json is complete.
            write_text(folder / "run.json", json.dumps(facts, indent=1))
        except OSError as error:
            raise InputError(
                f"cannot write a run to {folder}: {error.strerror}",
                hint="choose another folder with --runs DIR",
            ) from None
        return cls(folder)

    def __enter__(self) -> Self:
        self._lock = lock_folder(self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def expect(self, inputs: Mapping[str, str]) -> None:
        """Check that data, backbone and engine are those with which the run began.

        Raises:
            RunError: an input has changed since the run began.
        """
        changed = [name for name, value in inputs.items() if self.inputs.get(name) != value]
        if changed:
            raise RunError(
                f"since {self.folder} began, its {' and '.join(changed)} changed",
                hint="bring back what it began with, or start a new run",
            )

    @property
    def name(self) -> str:
        """The run's name, which is the name of its folder."""
        return self.folder.name

    def event(self, kind: str, **facts: Any) -> None:
        """Append one event with the time (UTC)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        _append(self.folder / "events.jsonl", {"time": now, "event": kind, **facts})

    def warn(self, what: str, dropped: Sequence[Dropped]) -> None:
        """Record a problem that does not end the run."""
        sites = [{"site": drop.site, "reason": drop.reason} for drop in dropped]
        self.event("warning", what=what, sites=sites)

    def commit(self, state: State, record: RoundRecord, layout: "Layout") -> None:
        """Make a round durable: first its metrics, then the checkpoint that makes them valid."""
        _append(self.folder / "metrics.jsonl", record.to_json())
        for drop in record.dropped:
            self.event("dropped", round=record.round, site=drop.site, reason=drop.reason)
        save_checkpoint(self.folder / CHECKPOINTS, state, layout.fingerprint)
        self.event("round", round=record.round, sites=record.sites)

    def resume(self, layout: "Layout") -> State | None:
        """Return the newest state that can be trusted; None if no round was committed.

        Metrics after that state are cut off.

        Raises:
            CheckpointError: there are checkpoints, but none is intact and of this layout.
        """
        state, damaged = load_newest(self.folder / CHECKPOINTS, layout.fingerprint)
        for name in damaged:
            self.event("warning", what=f"checkpoint {name} is damaged", sites=[])
        self._cut_metrics(state.round if state else 0)
        if state:
            self.event("resumed", round=state.round)
        return state

    def latest(self, layout: "Layout") -> State | None:
        """Return the same state as ``resume``, without changing the run."""
        return load_newest(self.folder / CHECKPOINTS, layout.fingerprint)[0]

    def save_partial(self, partial: Partial, layout: "Layout") -> None:
        """Make the state of the unfinished round durable."""
        save_partial(self.folder / CHECKPOINTS, partial, layout.fingerprint)

    def load_partial(self, number: int, attempt: int, layout: "Layout") -> Partial | None:
        """Return the state that ``save_partial`` saved for this attempt at this round, or None."""
        kept = load_partial(self.folder / CHECKPOINTS, layout.fingerprint, number, attempt)
        if kept:
            self.event("resumed", round=number - 1, replies=len(kept.answered))
        return kept

    def next_masked_round(self) -> int:
        """Return a number for a masked round, greater each time, also after a crash.

        Sites answer each number only once, so a repeated round needs another number.
        """
        path = self.folder / "masked_rounds"
        number = int(path.read_text(encoding="utf-8")) + 1 if path.exists() else 1
        write_text(path, f"{number}\n")
        return number

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the run's summary, which marks the run as finished."""
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        self.event("finished")

    def history(self) -> list[dict[str, Any]]:
        """Return the metrics of every round so far."""
        return _read_lines(self.folder / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Return every event so far."""
        return _read_lines(self.folder / "events.jsonl")

    def environment(self) -> dict[str, str]:
        """Return versions and machine, as recorded when the run began."""
        text = (self.folder / "environment.json").read_text(encoding="utf-8")
        return dict(json.loads(text))

    def summary(self) -> dict[str, Any] | None:
        """Return the run's summary; None if the run has not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _cut_metrics(self, last: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in self.history() if line["round"] <= last]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def list_runs(parent: Path) -> list[Run]:
    """Return the runs below ``parent``, oldest first; other folders are skipped."""
    runs = []
    for path in sorted(parent.glob("*/run.json")):
        with suppress(InputError):
            runs.append(Run(path.parent))
    return sorted(runs, key=lambda run: run.created)


def _environment() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a+b") as file:
        # If a crash cut the last line, this line must begin on a new one, or both would be lost.
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of JSON lines; skip an incomplete line, which kill -9 can leave."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
