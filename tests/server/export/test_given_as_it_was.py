"""An export is loaded as its card says, and is no larger than the backbone that it came from."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.language_models import save_language_model

from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.config.jobfile import parse_job
from fedgraft.server.export.adapter import export_adapter, export_merged
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run


def opened(folder: Path, **config: Any) -> tuple[Run, Workbench, Any]:
    """A run of a classifier of GPT-2, whose folder has these keys in its ``config.json``."""
    backbone = save_language_model("gpt2", folder / "backbone")
    path = backbone / "config.json"
    told = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: one for key, one in told.items() if one is not None}))
    job = parse_job(
        {
            "job": {"name": "t", "task": "text-classification", "labels": ["no", "yes"]},
            "backbone": {"source": f"path:{backbone}"},
            "method": {"kind": "lora", "rank": 2, "targets": ["c_attn"], "head": "shared"},
        },
        where="test",
    )
    bench = open_workbench(job)
    run = Run.create(folder / "runs", job)
    return run, bench, make_plan(job, bench, run.session).exchanged


def test_a_classifier_without_a_padding_token_works_as_its_card_says(tmp_path: Path) -> None:
    run, bench, exchanged = opened(tmp_path, pad_token_id=None)
    export_adapter(run, bench, exchanged, bench.initial_of(exchanged), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "pad_token_id=0" in code
    options = {"num_labels": 2, "ignore_mismatched_sizes": True, "pad_token_id": 0}
    model = PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "backbone", **options
        ),
        tmp_path / "out",
    ).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0]])
    mask = (ids > 0).long()
    with torch.inference_mode():
        both = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :1], attention_mask=mask[1:, :1]).logits
    torch.testing.assert_close(both[1:], alone)


def test_a_backbone_that_names_its_padding_needs_no_more_words(tmp_path: Path) -> None:
    run, bench, exchanged = opened(tmp_path)
    export_adapter(run, bench, exchanged, bench.initial_of(exchanged), tmp_path / "out")
    assert "pad_token_id" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_merged_model_has_the_type_of_its_backbone(dtype: torch.dtype, tmp_path: Path) -> None:
    run, _, _ = opened(tmp_path)
    path = tmp_path / "backbone" / "model.safetensors"
    save_file({k: one.to(dtype) for k, one in load_file(path).items()}, path, {"format": "pt"})
    bench = open_workbench(run.job)
    exchanged = make_plan(run.job, bench, run.session).exchanged
    noise = np.random.default_rng(0).normal(0, 0.05, exchanged.size)
    adapter = (bench.initial_of(exchanged) + noise).astype(np.float32)
    export_merged(run, bench, exchanged, adapter, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    wanted = torch.float32 if dtype == torch.float16 else dtype  # float16 is no type for a merge
    assert {one.dtype for one in written.values() if one.is_floating_point()} == {wanted}
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 1.2 * path.stat().st_size * wanted.itemsize / dtype.itemsize
    kept = next(iter(bench.model.parameters()))
    assert kept.dtype == torch.float32  # what is in use here did not change
