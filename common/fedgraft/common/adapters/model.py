"""A backbone with its adapter attached, loaded once per process and shared in that process.

A coordinator reads the initial adapter from it and uses it for exports. At a site, the computation
runs in a ``Stack`` (``client/model/batched_model.py``) on the same frozen tensors.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel

from fedgraft.common.adapters.attach import adapter_layout, attach, read, write
from fedgraft.common.adapters.domain_statistics import domain_tensors, feature_size
from fedgraft.common.adapters.fisher import consolidation_tensors
from fedgraft.common.adapters.resident import Resident, resident
from fedgraft.common.backbones.folder import refuse_incomplete
from fedgraft.common.backbones.load import (
    Backbone,
    LoadedBackbone,
    head_names,
    load,
    read_config,
)
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError, InputError
from fedgraft.common.layout import Layout, Vector, is_head
from fedgraft.common.messages.codec import array_hash
from fedgraft.common.tasks import Task

__all__ = [
    "Workbench",
    "cache_folder",
    "choose_device",
    "made_of",
    "open_processor",
    "open_workbench",
]


T = TypeVar("T")


@dataclass(frozen=True)
class Workbench:
    """One job's model in this process.

    ``own`` are the names of the tensors that stay at a site: a head with the policy ``local``, the
    factors B of the rule ``fedsa``. ``heads`` is the number of each label's head if a job has
    several heads (``General.head_of``). ``task`` and ``seed`` are the job's.

    ``layout`` contains every adapter tensor; ``initial``, float32 [layout.size], are their initial
    values. ``fresh_head``: the head has no pre-training, so zero-shot has no meaning. ``drawn`` is
    the SHA-256 over frozen parameters that were drawn from a seed and are not in the backbone's
    folder; it is empty if there are none. A model with drawn parameters cannot be rebuilt from
    folder and adapter alone.
    """

    own: tuple[str, ...]
    heads: tuple[int, ...]
    task: Task
    seed: int
    backbone: Backbone
    model: PeftModel
    processor: Any
    layout: Layout
    initial: Vector
    fresh_head: bool
    drawn: str
    backbone_parameters: int

    @property
    def local(self) -> Layout:
        """Return the layout of the tensors that stay at a site."""
        return self.layout.only(self.own)

    @property
    def carried(self) -> Layout:
        """Return the layout of the adapter tensors that sites exchange."""
        return _carried(self.layout, self.own)

    def initial_of(self, layout: Layout) -> Vector:
        """Return the initial values of the tensors in ``layout``, float32 [layout.size]."""
        return self.layout.part(self.initial, layout)

    def put(self, *parts: tuple[Layout, Vector]) -> None:
        """Reset the adapter to ``initial``, then write ``parts`` over it in order."""
        for layout, vector in ((self.layout, self.initial), *parts):
            write(self.model, layout, vector)

    def fixed_hash(self, trained: Iterable[str]) -> str:
        """Return the SHA-256 over the seed-drawn values that neither train nor travel.

        These are adapter tensors not in ``trained``, and drawn parameters of the backbone.
        Coordinator and sites compare the hash, because another version of a library might draw
        other values.
        """
        rest = self.layout.only(set(self.layout.names) - set(trained))
        parts = [self.initial[self.layout.slices[name]] for name in rest.names]
        drawn = [np.frombuffer(self.drawn.encode(), np.uint8)] if self.drawn else []
        return array_hash(*parts, *drawn)


def _carried(layout: Layout, own: Iterable[str]) -> Layout:
    return layout.only(set(layout.of_model.names) - set(own))


def _own(layout: Layout, job: Job) -> tuple[str, ...]:
    heads = job.method.head == "local"
    return tuple(name for name in layout.names if (heads and is_head(name)) or job.rule.keeps(name))


def open_workbench(job: Job) -> Workbench:
    """Return the workbench for ``job``, on the CPU.

    It is the same object for the same backbone and method, while the backbone's files are the same.

    Raises:
        BackboneError: the backbone cannot be found or loaded, or its files change meanwhile.
        AdapterError: the method's targets match nothing.
    """
    return _bench(job, resident(job.backbone.source, job.backbone.weights))


def made_of(job: Job, key: str, make: Callable[[Workbench], T]) -> T:
    """Return what ``make`` made of the job's workbench; it is kept under ``key`` with it.

    Raises:
        FedgraftError: as ``open_workbench``.
    """
    held = resident(job.backbone.source, job.backbone.weights)
    bench = _bench(job, held)
    made = held.made.setdefault(_shaping_of(job), {})
    if key not in made:
        made[key] = make(bench)
    found: T = made[key]
    return found


def _bench(job: Job, held: Resident) -> Workbench:
    # Only these sections decide the model: other rounds or training settings must not reload it.
    shaping = _shaping_of(job)
    if shaping not in held.benches:
        made = _made(job, held)
        held.check()  # its files were looked at first, and read since
        held.keep(shaping, made)
    held.benches.move_to_end(shaping)
    bench: Workbench = held.benches[shaping]
    return bench


def _shaping_of(job: Job) -> str:
    """Return the sections of a job, as JSON, that decide its model and its layout."""
    shaping: dict[str, Any] = {
        "job": set(type(job.job).model_fields) - {"name"},
        **dict.fromkeys(("backbone", "method"), True),
    }
    if job.rule.keeps_own:  # otherwise the rule does not decide which tensors stay
        shaping["aggregation"] = {"rule"}
    return job.model_dump_json(include={**shaping, "training": {"domain", "consolidation"}})


def _made(job: Job, held: Resident) -> Workbench:
    processor = _processor(job, held)
    loaded = load(held.backbone, job)
    drawn = _drawn_hash(loaded, head_trains=job.method.head != "frozen")
    processor.configure(loaded.model.config)
    size = feature_size(loaded.model) if job.training.domain is not None else 0
    fixed = dict(loaded.model.named_parameters())
    model = attach(loaded.model, job)
    held.share(model, {id(fixed[name]): name for name in fixed.keys() - set(loaded.drawn)})
    layout = adapter_layout(model)
    own = _own(layout, job)
    initial = read(model, layout)
    if job.training.domain is not None:
        beside, values = domain_tensors(job.training.domain, size, job.job.seed)
        layout, initial = layout.joined(beside), np.concatenate([initial, values])
    if job.training.consolidation is not None:
        carried = _carried(layout, own)
        beside, values = consolidation_tensors(job.training.consolidation, carried)
        layout, initial = layout.joined(beside), np.concatenate([initial, values])
    return Workbench(
        own=own,
        heads=job.job.head_of,
        task=job.task,
        seed=job.job.seed,
        backbone=held.backbone,
        model=model,
        processor=processor,
        layout=layout,
        initial=initial,
        fresh_head=loaded.fresh_head,
        drawn=drawn,
        backbone_parameters=loaded.parameters,
    )


def open_processor(job: Job) -> tuple[Backbone, Any]:
    """Return the job's backbone, checked but not loaded, and the processor of its inputs.

    Raises:
        BackboneError: the backbone cannot be found, or has no tokenizer or image settings.
    """
    held = resident(job.backbone.source, job.backbone.weights)
    return held.backbone, _processor(job, held)


def _processor(job: Job, held: Resident) -> Any:
    modality = job.task.modality
    if modality.name not in held.processors:
        try:
            loaded = modality.load(held.backbone.folder, read_config(held.backbone))
        except BackboneError:
            refuse_incomplete(held.backbone.folder, held.backbone.source)
            raise
        held.check()
        held.processors[modality.name] = loaded
    return held.processors[modality.name]


def _drawn_hash(loaded: LoadedBackbone, *, head_trains: bool) -> str:
    """Return the SHA-256 over the drawn parameters that stay frozen; empty if there are none."""
    heads = tuple(f"{name}." for name in head_names(loaded.model)) if head_trains else ()
    frozen = [name for name in loaded.drawn if not (heads and name.startswith(heads))]
    parameters = dict(loaded.model.named_parameters())
    return array_hash(*(parameters[name].numpy() for name in frozen)) if frozen else ""


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``wanted``; ``auto`` takes cuda, else mps, else cpu.

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
    """Return the folder for files that can be made again: ``FEDGRAFT_CACHE`` or ~/.cache/fedgraft.

    Only this user may read it, because it contains encoded examples of sites.
    """
    folder = Path(os.environ.get("FEDGRAFT_CACHE") or Path.home() / ".cache" / "fedgraft")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
