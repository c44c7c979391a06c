"""Export the merged model as an ONNX graph for runtimes without PyTorch, and check it.

``torch.export`` (``dynamo=True``) traces the graph, with variable numbers of examples and tokens.
The older exporter, which uses TorchScript, is not used: from transformers' attention masks and from
batch normalisation it can make graphs that run but compute other logits. Therefore the file is
written only if onnxruntime computes the same logits as PyTorch, also for other sizes than the
traced ones.
"""

import copy
import logging
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.adapters.model_card import model_card
from fedgraft.common.adapters.peft_folder import folder_facts, replace_folder
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError, InputError
from fedgraft.common.layout import Layout, Vector
from fedgraft.server.export.adapter import origin_of
from fedgraft.server.runs.run_folder import Run

__all__ = ["example_inputs", "export_onnx", "largest_difference", "open_axes"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"
OPSET = 18  # the oldest that torch.export writes, because most runtimes support it
CLOSE = 1e-3  # times the largest logit: float32 kernels differ, but a wrong graph differs far more
TRACED = (2, 12)  # examples and tokens
SMALLEST = (1, 1)
TRIED = (TRACED, (1, 7), (5, 16))
ONE_FILE = 1 << 30  # bytes of weights in one file; protobuf cannot hold more than twice as many

Inputs = dict[str, torch.Tensor]


class _Logits(nn.Module):
    """The model as a function from its inputs, in order, to its logits."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def export_onnx(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write the backbone with ``adapter`` merged in as ``model.onnx``, with its input settings.

    Raises:
        InputError: the extra ``onnx`` is not installed, ``folder`` exists and is not an earlier
            export, or the job's modality has no example inputs.
        BackboneError: the model cannot be traced, or its graph computes other logits.
    """
    _require_packages()
    inputs = example_inputs(bench, run.job, *TRACED)
    axes = open_axes(inputs, example_inputs(bench, run.job, *SMALLEST))
    bench.put((exchanged, adapter))
    merged = copy.deepcopy(bench.model).merge_and_unload()
    merged.config.use_cache = False  # the graph runs once, so the cache must not be an output
    model = _Logits(merged.eval(), tuple(inputs))
    origin = origin_of(run)
    card = model_card(bench, run.job, origin, form="onnx")

    def write(target: Path) -> None:
        _trace(model, inputs, target / FILE, axes=axes)
        off = largest_difference(target / FILE, model, bench, run.job)
        if not off <= CLOSE:
            raise BackboneError(
                f"the ONNX graph of {bench.backbone.source} computes other logits than PyTorch "
                f"(off by {off:.2g} of the largest)",
                hint="export with --merge instead, and report the architecture",
            )
        merged.config.save_pretrained(target)
        for file in bench.backbone.folder.glob("*.json"):  # tokenizer, image settings
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(file, target / file.name)
        (target / "README.md").write_text(card, encoding="utf-8")

    replace_folder(folder, folder_facts(bench, run.job, origin), write)


def example_inputs(bench: Workbench, job: Job, examples: int, tokens: int) -> Inputs:
    """Return inputs of the right names, shapes and types; their content does not matter.

    Raises:
        InputError: the job's modality has no example inputs.
    """
    draw = np.random.default_rng(examples)
    modality, config = job.task.modality, bench.model.config
    found = modality.samples(bench.processor, config, job.settings, draw, (examples, tokens))
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _require_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format onnx needs {', '.join(missing)}", hint="pip install 'fedgraft[onnx]'"
        )


def open_axes(first: Inputs, second: Inputs) -> tuple[dict[int, Any], ...]:
    """Return the axes of each input whose sizes differ between two examples of inputs, in order."""
    return tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, sizes in enumerate(zip(first[name].shape, second[name].shape, strict=True))
            if sizes[0] != sizes[1]
        }
        for name in first
    )


def _trace(model: _Logits, inputs: Inputs, path: Path, *, axes: tuple[dict[int, Any], ...]) -> None:
    """Write the graph; ``axes`` are the axes of each input that may have any size."""
    size = sum(weight.nbytes for weight in model.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # transformers' tracing warns without need
        try:
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=["logits"],
                opset_version=OPSET,
                dynamic_shapes=(axes,),
                dynamo=True,
                external_data=size > ONE_FILE,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many classes if it cannot trace
            raise BackboneError(
                f"this architecture cannot be traced for ONNX ({type(error).__name__})",
                hint="export with --merge instead",
            ) from None


def largest_difference(path: Path, model: nn.Module, bench: Workbench, job: Job) -> float:
    """Return the largest difference of onnxruntime's and PyTorch's logits over the largest logit.

    It is computed for batches of several sizes and lengths. It is infinite if the graph does not
    run with one of them, or returns another shape.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    asked = {one.name for one in session.get_inputs()}
    worst = 0.0
    for examples, tokens in TRIED:
        inputs = example_inputs(bench, job, examples, tokens)
        with torch.inference_mode():
            wanted: NDArray[np.float32] = model(*inputs.values()).numpy()
        feed = {name: value.numpy() for name, value in inputs.items() if name in asked}
        try:
            (found,) = session.run(["logits"], feed)
        except Exception:  # onnxruntime's exceptions have no common parent
            return float("inf")
        if found.shape != wanted.shape:
            return float("inf")
        off = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-9))
        worst = max(worst, off)
    return worst
