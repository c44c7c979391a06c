"""Runs in folders: small states to commit, and what is there afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.layout import Layout
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import Dropped, RoundRecord, State

__all__ = [
    "LAYOUT",
    "checkpoints",
    "commit",
    "kinds",
    "make_job",
    "make_record",
    "make_state",
    "same",
]


LAYOUT = Layout(("base.q.lora_A.default.weight", "base.q.lora_B.default.weight"), ((2, 3), (4, 2)))


def make_job(**rounds: Any) -> Job:
    raw = {
        "job": {"name": "wards", "task": "text-classification", "labels": ["no", "yes"], "seed": 5},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "lora", "head": "shared"},
        "rounds": rounds,
        "simulation": {"train": "/data/train.jsonl", "sites": 4},
    }
    return parse_job(raw, where="test")


def make_state(number: int, **changes: Any) -> State:
    draw = np.random.default_rng(number)
    state = State(
        round=number,
        adapter=draw.normal(size=LAYOUT.size).astype(np.float32),
        moments={"m": draw.normal(size=LAYOUT.size), "v": draw.random(LAYOUT.size) * 1e-9},
        best=draw.normal(size=LAYOUT.size).astype(np.float32),
        best_score=-0.1 - number / 3,
        stale=number % 2,
    )
    return replace(state, **changes)


def make_record(number: int, dropped: tuple[Dropped, ...] = ()) -> RoundRecord:
    return RoundRecord(number, 3, 3, dropped, 30, 1 / number, 0.5, {"loss": 0.25}, 1000, 2000, 1.5)


def commit(run: Run, *numbers: int) -> None:
    for number in numbers:
        run.commit(make_state(number), make_record(number), LAYOUT)


def checkpoints(run: Run) -> list[Path]:
    return sorted((run.folder / "checkpoints").iterdir())


def same(state: State | None, wanted: State) -> bool:
    assert state is not None
    assert state.adapter.dtype == np.float32
    return (
        (state.round, state.best_score, state.stale)
        == (wanted.round, wanted.best_score, wanted.stale)
        and state.adapter.tobytes() == wanted.adapter.tobytes()
        and (state.best is None) == (wanted.best is None)
        and (wanted.best is None or np.array_equal(state.best, wanted.best))  # type: ignore[arg-type]
        and state.moments.keys() == wanted.moments.keys()
        and all(
            state.moments[name].tobytes() == value.tobytes()
            and state.moments[name].dtype == value.dtype
            for name, value in wanted.moments.items()
        )
    )


def kinds(run: Run) -> list[str]:
    return [event["event"] for event in run.events()]
