"""Models of timm come in as its repositories on the hub are laid out, or a missing library is said.

That they train and are given away is among the families (``tests/simulations/test_families.py``).
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.backbones.timm import name_timm_labels
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError
from fedgraft.common.layout import is_head
from fedgraft.common.modalities.image import ImageProcessor

CUT: dict[str, Any] = {"input_size": [3, 32, 32], "crop_pct": 0.8, "interpolation": "bilinear",
       "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}  # fmt: skip
LABELS = ["cat", "dog", "fox"]


def job_of(folder: Path, labels: list[str]) -> Job:
    raw = {
        "job": {"name": "timm", "task": "image-classification", "labels": labels},
        "backbone": {"source": f"path:{folder}"},
        "method": {"kind": "lora", "rank": 2, "targets": "all-conv", "head": "shared"},
    }
    return parse_job(raw, where="test")


def write_as_on_the_hub(folder: Path) -> dict[str, torch.Tensor]:
    """No ``model_type``, no prefix before names, settings of images inside config.json."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=len(LABELS), pretrained=False)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told: dict[str, Any] = {"architecture": "resnet18", "num_classes": 3, "label_names": LABELS}
    told |= {"pretrained_cfg": {**CUT, "num_classes": 3, "classifier": "fc"}}
    (folder / "config.json").write_text(json.dumps(told))
    return weights


def test_a_repository_of_the_hub_is_a_backbone(tmp_path: Path) -> None:
    weights = write_as_on_the_hub(tmp_path / "resnet18")
    bench = open_workbench(job_of(tmp_path / "resnet18", LABELS))
    assert not bench.fresh_head and not bench.drawn  # its labels are the job's
    found = bench.model.get_base_model().timm_model.fc.original_module.weight
    assert torch.equal(found, weights["fc.weight"])
    other = open_workbench(job_of(tmp_path / "resnet18", ["a", "b"]))
    assert other.fresh_head and other.drawn == ""  # a new head, which trains
    heads = [name for name in other.layout.names if is_head(name)]
    assert [name.rpartition(".")[2] for name in heads] == ["bias", "weight"]
    assert other.layout.shapes[-1] == (2, 512)


def test_images_are_prepared_as_timm_does(tmp_path: Path) -> None:
    write_as_on_the_hub(tmp_path / "resnet18")
    create_transform = pytest.importorskip("timm.data").create_transform

    processor = open_workbench(job_of(tmp_path / "resnet18", LABELS)).processor
    assert isinstance(processor, ImageProcessor) and processor.size == (32, 32)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    image = Image.fromarray(noise)
    wanted = create_transform(**{**CUT, "input_size": tuple(CUT["input_size"])}, crop_mode="center")
    np.testing.assert_allclose(
        processor.pixels([image], "backbone")[0], wanted(image).numpy(), atol=1e-5
    )


def test_a_task_without_labels_keeps_the_number_of_outputs(tmp_path: Path) -> None:
    told = {"model_type": "timm_wrapper", "num_classes": 3, "label_names": LABELS}
    (tmp_path / "config.json").write_text(json.dumps({**told, "pretrained_cfg": CUT}))
    options = {"num_labels": 1, "problem_type": "regression"}
    config = AutoConfig.from_pretrained(tmp_path, **options)
    name_timm_labels(config, ())
    config.save_pretrained(tmp_path / "merged")
    again = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (again.num_labels, again.problem_type) == (1, "regression")
    name_timm_labels(config, ["a", "b"])
    assert (config.num_classes, config.label_names) == (2, ["a", "b"])


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "vgg").mkdir()
    config = {"model_type": "timm_wrapper", "architecture": "vgg11", "pretrained_cfg": CUT}
    (tmp_path / "vgg" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "vgg" / "model.safetensors")
    with pytest.raises(BackboneError, match="timm") as caught:
        open_workbench(job_of(tmp_path / "vgg", LABELS))
    assert "fedgraft[timm]" in caught.value.hint
