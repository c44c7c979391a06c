"""Checkpoints that can be trusted: one file each, whose name holds the SHA-256 of its content.

    checkpoints/round-000007.<sha256>.safetensors

A file is renamed into place after fsync, so there is no moment at which a half-written one could be
taken for a good one.
"""

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedgraft.common.errors import CheckpointError
from fedgraft.common.files import write_atomically
from fedgraft.server.state import State

__all__ = ["load_newest", "save_checkpoint"]

CHECKPOINT = re.compile(r"round-(\d{6})\.([0-9a-f]{64})\.safetensors")
KEPT = 2


def save_checkpoint(folder: Path, state: State, layout: str) -> Path:
    """Write ``state`` into ``folder`` and remove all but the newest two checkpoints.

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
    draft = folder / "draft.safetensors"
    write_atomically(draft, lambda path: save_file(tensors, path, {"state": json.dumps(facts)}))
    name = f"round-{state.round:06d}.{_sha256(draft)}.safetensors"
    write_atomically(folder / name, lambda path: draft.replace(path))
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return folder / name


def load_newest(folder: Path, layout: str) -> tuple[State | None, list[str]]:
    """The newest intact state of this ``layout`` (None without checkpoints); names of damaged ones.

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
    """Checkpoint files in ``folder``, oldest round first."""
    return sorted(p for p in folder.glob("round-*") if CHECKPOINT.fullmatch(p.name))


def _load(path: Path, layout: str) -> State | None:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
