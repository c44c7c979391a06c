"""One site with some digits, and a coordinator's plan for it."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.training.trainer import (
    Span,
    Trained,
    TrainingTask,
    train_alone,
    train_together,
)
from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.layout import Vector
from fedgraft.common.messages.codec import encode
from fedgraft.common.messages.payloads import EvaluateRequest, TrainReply, TrainRequest
from fedgraft.common.seeds import torch_generator
from fedgraft.server.plan import Plan, make_plan
from fedgraft.simulations.demo import digits

__all__ = ["SESSION", "Place", "make_job", "wire", "write_rows"]

SESSION = "0123456789abcdef" * 2


def make_job(*, rule: str = "fedavg", head: str = "shared", **training: Any) -> Job:
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": list(digits.NAMES)},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "head": head},
        "training": {"batch_size": 16, **training},
        "rounds": {"count": 4},
        "aggregation": {"rule": rule},
        "data": {"validation": 0.25, "normalize": "per-image"},
    }
    return parse_job(raw, where="test")


def write_rows(folder: Path) -> None:
    """80 digits to train on and 30 to test on."""
    train_rows, test_rows = digits.load()
    train_rows.select(range(80)).to_parquet(folder / "train.parquet")
    test_rows.select(range(30)).to_parquet(folder / "test.parquet")


class Place:
    """One site and a coordinator's plan for it."""

    def __init__(self, rows: Path, folder: Path, job: Job, name: str = "st-mary") -> None:
        folder.mkdir(exist_ok=True)
        self.path, self.state = folder / f"{name}.toml", folder / "state"
        data = f'train = "{rows}/train.parquet"\ntest = "{rows}/test.parquet"\n'
        self.path.write_text(f'name = "{name}"\ndevice = "cpu"\n[data]\n{data}')
        self.job = job
        self.bench: Workbench = open_workbench(job)
        self.plan: Plan = make_plan(job, self.bench, SESSION)

    def site(self) -> Participant:
        """As after a restart: nothing of it is remembered in the object."""
        return open_participant({"site": str(self.path), "state": str(self.state)})

    def train(self, number: int = 1, *, seed: int = 0, session: str = SESSION) -> TrainReply:
        """Train by itself, as after a restart."""
        request = self.training(number, seed=seed, session=session)
        return train_together([self.site().train(request)])[0]

    def directly(self, number: int, head: Vector | None = None) -> Trained:
        """What training in this round comes to, with the site's own head where it has one."""
        bench, request = self.bench, self.training(number)
        trained = bench.layout.only((*self.plan.exchanged.names, *bench.local.names))
        own = [] if head is None else [(bench.local, head)]
        start = trained.merged(
            bench.initial_of(trained), *own, (self.plan.exchanged, request.adapter)
        )
        draw = torch_generator(self.job.job.seed, "train", number, "st-mary")
        task = TrainingTask(self.site().splits(self.job).train, start, draw)
        span = Span((number - 1) / 4, number / 4)
        stack = self.site().stack(self.job)
        return train_alone(stack, trained, task, settings=self.job.training, span=span)

    def update(self, number: int, head: Vector | None = None) -> Vector:
        """The update of a round that starts from this head, trained directly."""
        bench, exchanged = self.bench, self.plan.exchanged
        trained = bench.layout.only((*exchanged.names, *bench.local.names))
        vector = self.directly(number, head).vector
        update: Vector = trained.part(vector, exchanged) - self.adapter()
        return update

    def head(self, number: int, head: Vector | None = None) -> Vector:
        """The head that such a round comes to."""
        trained = self.bench.layout.only((*self.plan.exchanged.names, *self.bench.local.names))
        return trained.part(self.directly(number, head).vector, self.bench.local)

    def kept(self, number: int) -> Vector:
        """The head that the site has kept of a round."""
        kept: Vector = load_file(self.state / SESSION / f"{number:06d}.safetensors")["head"]
        return kept

    def adapter(self, seed: int = 0) -> Vector:
        start = self.bench.initial_of(self.plan.exchanged)
        noise = np.random.default_rng(seed).normal(0, 0.02, start.shape)
        return (start + noise).astype(np.float32)

    def training(self, number: int = 1, *, seed: int = 0, session: str = SESSION) -> TrainRequest:
        names = self.plan.exchanged.names
        return TrainRequest(session, number, 0, self.plan.request.job, names, self.adapter(seed))

    def evaluating(self, number: int = 1, *, split: str = "test") -> EvaluateRequest:
        names, text = self.plan.exchanged.names, self.plan.request.job
        return EvaluateRequest(SESSION, number, text, names, split, self.adapter())


def wire(reply: TrainReply) -> bytes:
    """The reply as it travels."""
    return b"".join(record.deflate() for record in encode(reply).values())
