"""Every architecture of the guide: adapted, trained by two sites, given away, loaded elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from support.families import FAMILIES, family_job
from support.federations import adapter_of
from support.matrix import slow_unless

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model.batched_model import check_stacking, open_stack
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.console import Console
from fedgraft.common.errors import InputError
from fedgraft.common.examples import Examples
from fedgraft.common.tasks import TASKS
from fedgraft.server.export.adapter import export_adapter, export_merged
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate


def examples_of(job: Job) -> Examples:
    assert job.simulation is not None
    rows = read_split(str(job.simulation.test), job).dataset
    return encode(rows, open_workbench(job).processor, job, store=None, key="")


@torch.inference_mode()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs).logits
    return found.clone()


QUICK = (  # one of three makes; the contract suites have one of each task
    ("resnet", True),
    ("xlnet", False),
    ("wav2vec2", False),
)
EVERY = [
    (name, partial)
    for partial in (False, True)
    for name in FAMILIES
    if not partial or name != "inception"  # has no numbered blocks
]


@pytest.mark.parametrize(("name", "partial"), slow_unless(EVERY, QUICK.__contains__))
def test_a_family_trains_and_is_given_away(name: str, partial: bool, tmp_path: Path) -> None:
    job = family_job(name, tmp_path, partial=partial)
    prepared = prepare(job)
    with Run.create(tmp_path / "runs", job) as run:
        simulate(prepared, run, Console(quiet=True), engine="local")
    bench = open_workbench(job)
    exchanged, adapter = make_plan(job, bench, run.session).exchanged, adapter_of(run)
    inputs = as_tensors(examples_of(job).batch(np.arange(4)))
    bench.put()  # a run leaves its last adapter in it
    untrained = logits(bench.model, inputs)
    bench.put((exchanged, adapter))
    trained = logits(bench.model, inputs)
    bench.put()
    assert not torch.allclose(trained, untrained, atol=1e-3), "it did not train"
    initial = bench.initial_of(exchanged)
    # Biases of keys have no gradient. CLIP's last norm is in its pooled output, and XLNet's
    # segments in inputs that have some: neither is used here.
    idle = ("lora_A", "bias", "post_layernorm", "seg_embed")
    paths = {n: at for n, at in exchanged.slices.items() if not any(one in n for one in idle)}
    if not partial:
        paths = {n: at for n, at in paths.items() if ".lora_B." in n}
    still = [n for n, at in paths.items() if np.array_equal(adapter[at], initial[at])]
    assert not still, "a path got no gradient"

    auto = getattr(transformers, TASKS[job.job.task].auto_class)
    export_adapter(run, bench, exchanged, adapter, tmp_path / "peft")
    plain = auto.from_pretrained(
        tmp_path / "backbone", num_labels=job.measures.classes, ignore_mismatched_sizes=True
    )
    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded, inputs), trained, atol=1e-5, rtol=1e-4)
    export_merged(run, bench, exchanged, adapter, tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, inputs), trained, atol=1e-4, rtol=1e-3)
    assert list(merged.config.id2label.values()) == list(job.job.labels)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_trains_several_sites_in_one_pass(name: str, tmp_path: Path) -> None:
    job = family_job(name, tmp_path)
    inputs = as_tensors(examples_of(job).batch(np.arange(4)))
    if name != "xlnet":
        check_stacking(open_stack(job), inputs)
        return
    with pytest.raises(InputError, match="rows would mix"):  # it turns [rows, tokens] around
        check_stacking(open_stack(job), inputs)
