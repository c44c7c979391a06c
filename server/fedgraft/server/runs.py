"""A run is a folder: the job, what happened, checkpoints that can be trusted, the result.

    run.json            id, session, versions                 written once
    job.toml            the resolved job                      written once
    environment.json    versions and machine                  written once
    events.jsonl        what happened, appended
    metrics.jsonl       one line a round, appended before the round's checkpoint
    checkpoints/        round-000007.<sha256>.safetensors, the last two
    adapter/            the final adapter in PEFT format

A checkpoint is one file, renamed into place after fsync, whose name holds the SHA-256 of its
content: there is no moment at which a half-written one could be taken for a good one. Metrics of
rounds after the checkpoint are cut off on resume, because those rounds are done again.
"""

import fcntl
import hashlib
import json
import platform
import re
import secrets
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedgraft.common.adapters import Layout
from fedgraft.common.errors import CheckpointError, InputError, RunError
from fedgraft.common.files import write_atomically, write_text
from fedgraft.common.job import Job
from fedgraft.common.jobfile import dump_job, parse_job
from fedgraft.server.rounds import Dropped, RoundRecord, State

__all__ = ["Run", "list_runs"]

CHECKPOINT = re.compile(r"round-(\d{6})\.([0-9a-f]{64})\.safetensors")
KEPT_CHECKPOINTS = 2
PACKAGES = ("fedgraft", "flwr", "torch", "transformers", "peft", "datasets", "numpy")


class Run:
    """One execution of a job. Use as a context manager: it locks the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            job = tomllib.loads((folder / "job.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(
                f"{folder} is not the folder of a run", hint="`fedgraft runs` lists them"
            ) from None
        self.session: str = facts["session"]
        self.created: str = facts["created"]
        self.job = parse_job(job, where=str(folder / "job.toml"))
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, parent: Path, job: Job) -> Self:
        """A new run of ``job`` in a new folder below ``parent``.

        Raises:
            InputError: nothing can be written there.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        return cls._write(parent / f"{job.job.name}-{stamp}-{secrets.token_hex(2)}", job)

    @classmethod
    def open_or_create(cls, folder: Path, job: Job) -> Self:
        """The run in ``folder``, or a new one there if the folder has none."""
        return cls(folder) if (folder / "run.json").exists() else cls._write(folder, job)

    @classmethod
    def _write(cls, folder: Path, job: Job) -> Self:
        facts = {
            "run": folder.name,
            "session": secrets.token_hex(16),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_text(folder / "job.toml", dump_job(job))
            write_text(folder / "environment.json", json.dumps(_environment(), indent=1))
            # Last: a folder with a run.json is complete.
            write_text(folder / "run.json", json.dumps(facts, indent=1))
        except OSError as error:
            raise InputError(
                f"cannot write a run to {folder}: {error.strerror}",
                hint="choose another folder with --runs DIR",
            ) from None
        return cls(folder)

    def __enter__(self) -> Self:
        self._lock = (self.folder / "lock").open("w")
        try:
            # lockf, not flock: forked workers must not inherit it and outlive us with it
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(
                f"{self.folder} is in use by another process",
                hint="wait for it, or stop it first",
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.name

    def event(self, kind: str, **facts: Any) -> None:
        """Append one event with the time (UTC)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        _append(self.folder / "events.jsonl", {"time": now, "event": kind, **facts})

    def warn(self, what: str, dropped: Sequence[Dropped]) -> None:
        """Record that something went wrong which the run survives."""
        sites = [{"site": drop.site, "reason": drop.reason} for drop in dropped]
        self.event("warning", what=what, sites=sites)

    def commit(self, state: State, record: RoundRecord, layout: Layout) -> None:
        """Make a round durable: its metrics, then the checkpoint that makes them count."""
        _append(self.folder / "metrics.jsonl", record.to_json())
        for drop in record.dropped:
            self.event("dropped", round=record.round, site=drop.site, reason=drop.reason)
        save_checkpoint(self.folder / "checkpoints", state, layout)
        self.event("round", round=record.round, sites=record.sites)

    def resume(self, layout: Layout) -> State | None:
        """The newest state that can be trusted; None if no round was ever committed.

        Raises:
            CheckpointError: there are checkpoints, but none is intact and of this layout.
        """
        state = self.latest(layout)
        self._cut_metrics(state.round if state else 0)
        if state:
            self.event("resumed", round=state.round)
        return state

    def latest(self, layout: Layout) -> State | None:
        """The state of the newest intact checkpoint, as ``resume`` without touching the run."""
        folder = self.folder / "checkpoints"
        found = _checkpoints(folder)
        for path in reversed(found):
            state = load_checkpoint(path, layout)
            if state is not None:
                return state
            self.event("warning", what=f"checkpoint {path.name} is damaged", sites=[])
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {folder} is intact",
                hint="restore one from a backup, or start a new run",
            )
        return None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write what the run came to; from then on it is finished."""
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        self.event("finished")

    def history(self) -> list[dict[str, Any]]:
        """The metrics of every round so far."""
        return _read_lines(self.folder / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Every event so far."""
        return _read_lines(self.folder / "events.jsonl")

    def environment(self) -> dict[str, str]:
        """Versions and machine, as recorded when the run began."""
        text = (self.folder / "environment.json").read_text(encoding="utf-8")
        return dict(json.loads(text))

    def summary(self) -> dict[str, Any] | None:
        """What the run came to; None while it has not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _cut_metrics(self, last: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in self.history() if line["round"] <= last]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def save_checkpoint(folder: Path, state: State, layout: Layout) -> Path:
    """Write ``state`` into ``folder`` and remove all but the newest two checkpoints."""
    tensors = {"adapter": state.adapter, **{f"moment.{k}": v for k, v in state.moments.items()}}
    if state.best is not None:
        tensors["best"] = state.best
    facts = {
        "round": state.round,
        "best_score": state.best_score,
        "stale": state.stale,
        "layout": layout.fingerprint,
    }
    draft = folder / "draft.safetensors"
    write_atomically(draft, lambda path: save_file(tensors, path, {"state": json.dumps(facts)}))
    name = f"round-{state.round:06d}.{_sha256(draft)}.safetensors"
    write_atomically(folder / name, lambda path: draft.replace(path))
    for old in _checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        old.unlink()
    return folder / name


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files in ``folder``, oldest round first."""
    return sorted(path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name))


def load_checkpoint(path: Path, layout: Layout) -> State | None:
    """The state in ``path``; None if its content is not what its name says, or not this layout."""
    match = CHECKPOINT.fullmatch(path.name)
    try:
        if match is None or _sha256(path) != match[2]:
            return None
        with safe_open(path, framework="np") as file:
            facts = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    if facts["layout"] != layout.fingerprint:
        return None
    moments = {k.removeprefix("moment."): v for k, v in tensors.items() if k.startswith("moment.")}
    return State(
        round=facts["round"],
        adapter=tensors["adapter"],
        moments=moments,
        best=tensors.get("best"),
        best_score=facts["best_score"],
        stale=facts["stale"],
    )


def list_runs(parent: Path) -> list[Run]:
    """The runs below ``parent``, oldest first; folders that are none are passed over."""
    folders = sorted(path.parent for path in parent.glob("*/run.json"))
    runs = [Run(folder) for folder in folders]
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
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a torn last line, as kill -9 leaves it, is passed over."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
