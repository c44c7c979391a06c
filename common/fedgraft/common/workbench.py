"""A backbone with its adapter attached, loaded once per process and reused by whoever works there.

A coordinator reads the initial adapter from it, a site trains on it round after round, and in a
simulation every site of a process takes its turn on the same one: only adapter tensors are swapped.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from fedgraft.common.adapters import (
    Layout,
    Vector,
    adapter_layout,
    attach,
    is_head,
    read,
    write,
)
from fedgraft.common.backbones import TASKS, Backbone, find_backbone, load
from fedgraft.common.errors import InputError
from fedgraft.common.job import Job
from fedgraft.common.messages import array_hash
from fedgraft.common.processors import Processor, TextProcessor, load_processor

__all__ = ["Workbench", "cache_folder", "choose_device", "open_workbench"]


@dataclass(frozen=True)
class Workbench:
    """One job's model in this process; ``head`` is its method's head policy.

    ``layout`` names every adapter tensor, ``initial`` (float32 [layout.size]) is what they start
    from; ``fresh_head`` says that the head has no pre-training, so zero-shot means nothing.
    """

    head: str
    backbone: Backbone
    model: PeftModel
    processor: Processor
    layout: Layout
    initial: Vector
    fresh_head: bool
    backbone_parameters: int

    @property
    def local(self) -> Layout:
        """The tensors that stay at a site: the head, where its policy is ``local``."""
        keep = self.head == "local"
        return self.layout.only(name for name in self.layout.names if keep and is_head(name))

    def initial_of(self, layout: Layout) -> Vector:
        """The initial values of the tensors in ``layout``, float32 [layout.size]."""
        parts = [self.initial[self.layout.slices[name]] for name in layout.names]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def put(self, *parts: tuple[Layout, Vector]) -> None:
        """Reset the adapter to ``initial``, then write ``parts`` over it in order."""
        for layout, vector in ((self.layout, self.initial), *parts):
            write(self.model, layout, vector)

    def fixed_hash(self, trained: Iterable[str]) -> str:
        """SHA-256 over the initial values of every tensor that is not in ``trained``.

        They never travel, so coordinator and sites compare this to know that theirs are equal.
        """
        rest = self.layout.only(set(self.layout.names) - set(trained))
        return array_hash(*(self.initial[self.layout.slices[name]] for name in rest.names))


def open_workbench(job: Job, *, device: str = "cpu") -> Workbench:
    """The workbench for ``job`` on ``device``; the same object for the same backbone and method.

    Raises:
        BackboneError: the backbone cannot be found or loaded.
        AdapterError: the method's targets match nothing.
    """
    # Only these sections shape the model: rounds or training settings must not load it again.
    shaping = job.model_dump_json(include={"job", "backbone", "method"})
    return _open(shaping, device)


@lru_cache(maxsize=2)  # a federation and its head-only baseline
def _open(shaping: str, device: str) -> Workbench:
    job = Job.model_validate_json(shaping)
    backbone = find_backbone(job.backbone.source, weights=job.backbone.weights)
    loaded = load(backbone, job)
    modality = TASKS[job.job.task].modality
    processor = load_processor(backbone.folder, modality, loaded.model.config)
    if isinstance(processor, TextProcessor):  # GPT-like classifiers look for the last real token
        config: Any = loaded.model.config
        config.pad_token_id = processor.pad_id
    model = attach(loaded.model, job).to(device)
    layout = adapter_layout(model)
    return Workbench(
        head=job.method.head,
        backbone=backbone,
        model=model,
        processor=processor,
        layout=layout,
        initial=read(model, layout),
        fresh_head=loaded.fresh_head,
        backbone_parameters=loaded.parameters,
    )


def choose_device(wanted: str) -> torch.device:
    """``auto`` takes cuda, else mps, else cpu; a device that is not there is an error.

    Raises:
        InputError: the wanted device is not available on this machine.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, present in there.items() if present))
    if not there[wanted]:
        present = ", ".join(name for name in there if there[name])
        raise InputError(f"device {wanted} is not available here", hint=f"there is: {present}")
    return torch.device(wanted)


def cache_folder() -> Path:
    """Where things that can be made again are kept: ``FEDGRAFT_CACHE``, else ~/.cache/fedgraft."""
    return Path(os.environ.get("FEDGRAFT_CACHE") or Path.home() / ".cache" / "fedgraft")
