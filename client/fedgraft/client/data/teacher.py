"""A teacher at the site: a larger model, already trained for the labels, gives logits per example.

The logits are computed once and cached; then the teacher is released from memory. The teacher is
the site's own: its name and its logits never leave the site.
"""

import hashlib
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.data.batches import Passes, as_tensors, by_length, in_order
from fedgraft.client.data.cache import Store
from fedgraft.client.data.padding import Padding
from fedgraft.client.data.rows import encode
from fedgraft.common.adapters.resident import open_apart
from fedgraft.common.backbones.load import load, read_config
from fedgraft.common.config.job import Job
from fedgraft.common.config.sections import Backbone
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Indices

__all__ = ["teacher_logits"]

BATCH = 64


def teacher_logits(
    source: str, dataset: datasets.Dataset, job: Job, *, store: Store, device: torch.device
) -> NDArray[np.float32]:
    """Return the logits of teacher ``source`` (as ``backbone.source``), float32 [rows, classes].

    ``dataset`` comes from ``read_split`` and is not encoded: the teacher has a tokenizer and image
    settings of its own.

    Raises:
        BackboneError: there is no such model, its files change while they are read, or its head
            does not know the job's labels.
    """
    mine = job.model_copy(update={"backbone": Backbone(source=source)})
    held = open_apart(source)
    backbone = held.backbone
    processor = job.task.modality.load(backbone.folder, read_config(backbone))
    examples = encode(dataset, processor, mine, store=store, key=backbone.fingerprint)

    def make() -> dict[str, NDArray[Any]]:
        loaded = load(backbone, mine)
        held.check()  # logits are kept by the fingerprint
        if loaded.fresh_head:
            raise BackboneError(
                f"teacher {source}: its head does not know the job's labels",
                hint="a model trained for exactly these, say an `export --format merged` of a run",
            )
        model: Any = loaded.model
        processor.configure(model.config)
        model.to(device)
        return {"logits": _logits(model, Padding(model).settle(examples), device)}

    facts = ("teacher", backbone.fingerprint, examples.digest, device.type, torch.__version__,
             *job.job.labels)  # fmt: skip
    return store.get(hashlib.sha256("\n".join(facts).encode()).hexdigest(), make)["logits"]


@torch.inference_mode()
def _logits(model: Any, examples: Any, device: torch.device) -> NDArray[np.float32]:
    def answers(index: Indices) -> torch.Tensor:
        inputs = as_tensors(examples.batch(index))
        moved = {key: value.to(device) for key, value in inputs.items()}
        found: torch.Tensor = model(**moved).logits.float().cpu()
        return found

    passes = Passes(BATCH)
    found = [part for batch in by_length(examples, BATCH) for part in passes.over(batch, answers)]
    indices, answered = zip(*found, strict=True)
    logits: NDArray[np.float32] = in_order(indices, answered).numpy()
    return logits
