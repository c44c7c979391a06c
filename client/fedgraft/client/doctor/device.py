"""The doctor's checks of computing: the device, and three real steps of training on it.

The steps run the code that a round runs, on the built-in backbone with random inputs.
"""

import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft.client.doctor.local import FAIL, OK, WARN, Finding, Patient

if TYPE_CHECKING:
    import torch

__all__ = ["device", "training"]

DRIVER = Path("/proc/driver/nvidia/version")
STEPS, BATCH, CLASSES = 3, 8, 10
JOB = {
    "job": {
        "name": "doctor",
        "task": "image-classification",
        "labels": [str(number) for number in range(CLASSES)],
    },
    "backbone": {"source": "builtin:glyph-vit"},
    "method": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"], "head": "shared"},
    "training": {"batch_size": BATCH, "epochs": 1},
}


def device(patient: Patient) -> Finding:
    """Report the device that ``device`` of ``site.toml`` selects here, and its abilities."""
    import torch

    from fedgraft.common.adapters.model import choose_device

    chosen, driver = choose_device(patient.config.device), _driver()
    version = f"torch {torch.__version__}"
    if chosen.type != "cuda":
        what = f"{chosen.type}, no GPU in use; {version}"
        if driver and patient.config.device == "auto":
            hint = "install a torch built for CUDA, and give this user the device"
            return Finding("device", WARN, f"{what}; NVIDIA driver {driver} is here", hint)
        return Finding("device", OK, what)
    facts = torch.cuda.get_device_properties(chosen)
    free = torch.cuda.mem_get_info(chosen)[0]
    memory = f"{free / 1e9:.1f} of {facts.total_memory / 1e9:.1f} GB free"
    # Older cards only emulate bf16, which is slower than fp32.
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    parts = (facts.name, memory, f"driver {driver or 'unknown'}", half, version)
    return Finding("device", OK, ", ".join(parts))


def _driver() -> str:
    """Return the version that the NVIDIA driver reports; empty without a driver."""
    try:
        said = DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)\s", said)
    return found[1] if found else "of unknown version"


def training(patient: Patient) -> Finding:
    """Train a LoRA adapter for three steps with random inputs on the site's device."""
    import torch

    from fedgraft.common.adapters.model import choose_device

    chosen = choose_device(patient.config.device)
    began = time.perf_counter()
    try:
        moved, steps = _train(chosen)
    except torch.OutOfMemoryError:
        hint = "what else uses it? nvidia-smi says; the agent of this site may"
        return Finding("training", FAIL, f"{chosen.type} has no memory left", hint)
    seconds = time.perf_counter() - began
    if not moved:
        hint = f'set device = "cpu" in site.toml, and report what {chosen} is'
        return Finding("training", FAIL, "the steps changed nothing", hint)
    peak = _peak(chosen)
    what = f"{steps} steps of a LoRA adapter on {chosen.type} in {seconds:.1f} s"
    return Finding("training", OK, f"{what}, {peak} at most")


def _train(chosen: "torch.device") -> tuple[bool, int]:
    """Return whether training moved the adapter, and the number of steps."""
    import numpy as np
    import torch

    from fedgraft.client.model.batched_model import open_stack
    from fedgraft.client.training.trainer import TrainingTask, train_alone
    from fedgraft.common.config.jobfile import parse_job
    from fedgraft.common.examples import ImageExamples
    from fedgraft.common.seeds import numpy_generator, torch_generator

    job = parse_job(JOB, where="the doctor's job")
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
    stack = open_stack(job, device=str(chosen))
    processor = stack.bench.processor
    draw, count = numpy_generator(0, "doctor"), STEPS * BATCH
    shape = (count, processor.channels, *processor.size)
    examples = ImageExamples(
        draw.integers(0, CLASSES, count),
        draw.standard_normal(shape, dtype=np.float32),
        np.arange(count, dtype=np.int64),
    )
    task = TrainingTask(examples, stack.bench.initial, torch_generator(0, "doctor"))
    came = train_alone(stack, stack.bench.layout, task, settings=job.training)
    return not np.array_equal(came.vector, task.start), came.steps


def _peak(chosen: "torch.device") -> str:
    """Return the peak memory in words: of torch on a GPU, else of this whole process."""
    import torch

    if chosen.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(chosen) / 1e6:,.0f} MB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB elsewhere
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{used / 1e6:,.0f} MB of this process"
