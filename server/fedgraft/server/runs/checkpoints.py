"""Trusted checkpoints: each is one file, whose name holds the SHA-256 of its content.

    checkpoints/round-000007.<sha256>.safetensors

A file is renamed to its final name after fsync, so that an incomplete file is never taken for a
checkpoint.

    checkpoints/partial.<sha256>.safetensors

holds an unfinished round: the replies that were added up so far. Only the newest is kept, and it is
removed when the round has its checkpoint.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedgraft.common.errors import CheckpointError
from fedgraft.common.files import write_atomically
from fedgraft.server.state import Dropped, Partial, State, Traffic

__all__ = ["load_newest", "load_partial", "save_checkpoint", "save_partial"]

CHECKPOINT = re.compile(r"round-(\d{6})\.([0-9a-f]{64})\.safetensors")
PARTIAL = re.compile(r"partial\.([0-9a-f]{64})\.safetensors")
KEPT = 2


def save_checkpoint(folder: Path, state: State, layout: str) -> Path:
    """Write ``state`` into ``folder``, remove all but the newest two checkpoints, return the path.

    ``layout`` is the fingerprint of the adapter's layout.
    """
    folder.mkdir(exist_ok=True)
    tensors = {"adapter": state.adapter, **{f"moment.{k}": v for k, v in state.moments.items()}}
    if state.best is not None:
        tensors["best"] = state.best
    facts = {
        "round": state.round,
        "best_score": state.best_score,
        "stale": state.stale,
        "layout": layout,
    }
    path = _write(folder, f"round-{state.round:06d}", tensors, facts)
    for old in (*_checkpoints(folder)[:-KEPT], *_partials(folder)):
        old.unlink()
    return path


def save_partial(folder: Path, partial: Partial, layout: str) -> None:
    """Write ``partial`` into ``folder``, and remove an earlier one."""
    folder.mkdir(exist_ok=True)
    facts = {name: value for name, value in asdict(partial).items() if name != "tensors"}
    path = _write(folder, "partial", partial.tensors, {**facts, "layout": layout})
    for old in _partials(folder):
        if old != path:
            old.unlink()


def load_partial(folder: Path, layout: str, number: int, attempt: int) -> Partial | None:
    """Return the saved state of this ``attempt`` at round ``number``; None if none is intact."""
    for path in _partials(folder):
        found = _read(path, PARTIAL)
        if found is None:
            continue
        facts, tensors = found
        if (facts.pop("layout"), facts["round"], facts["attempt"]) != (layout, number, attempt):
            continue
        traffic = facts.pop("traffic")
        dropped = [Dropped(**drop) for drop in traffic.pop("dropped")]
        answered = tuple(facts.pop("answered"))
        traffic = Traffic(**traffic, dropped=dropped)
        return Partial(**facts, answered=answered, traffic=traffic, tensors=tensors)
    return None


def _write(folder: Path, name: str, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write a file whose name holds the SHA-256 of its content; return its path."""
    draft = folder / "draft.safetensors"
    write_atomically(draft, lambda path: save_file(tensors, path, {"state": json.dumps(facts)}))
    path = folder / f"{name}.{_sha256(draft)}.safetensors"
    write_atomically(path, lambda temporary: draft.replace(temporary))
    return path


def _partials(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("partial.*") if PARTIAL.fullmatch(p.name))


def load_newest(folder: Path, layout: str) -> tuple[State | None, list[str]]:
    """Return the newest intact state of this ``layout``, and the names of damaged checkpoints.

    The state is None if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none is intact and of this layout.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        state = _load(path, layout)
        if state is not None:
            return state, damaged
        damaged.append(path.name)
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {folder} is intact",
            hint="restore one from a backup, or start a new run",
        )
    return None, []


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files in ``folder``, oldest round first."""
    return sorted(p for p in folder.glob("round-*") if CHECKPOINT.fullmatch(p.name))


def _load(path: Path, layout: str) -> State | None:
    """Return the state in ``path``; None if its hash or its layout does not match."""
    found = _read(path, CHECKPOINT)
    if found is None:
        return None
    facts, tensors = found
    if facts["layout"] != layout:
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


def _read(path: Path, named: re.Pattern[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return facts and tensors of a file; None if its hash is not the one in its name."""
    match = named.fullmatch(path.name)
    try:
        if match is None or _sha256(path) != match[match.re.groups]:
            return None
        with safe_open(path, framework="np") as file:
            facts = json.loads(file.metadata()["state"])
            return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
