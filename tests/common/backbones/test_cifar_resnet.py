"""The networks of small images are those of the paper, and weights made elsewhere go in exactly."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification

from fedgraft.common.backbones.cifar_resnet import (
    CifarResnetConfig,
    CifarResnetForImageClassification,
    converted,
)
from fedgraft.common.backbones.load import find_backbone

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "simulations" / "examples" / "convert_cifar_resnet.py"
DATA = Path(os.environ.get("FEDGRAFT_DATA") or ROOT.parent / "shared")
REAL = DATA / "models" / "resnet_cifar10"


def state_dict(blocks: int, width: int) -> dict[str, torch.Tensor]:
    """Random weights under the names that such networks usually have."""
    draw = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def norm(name: str, size: int) -> None:
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = 0.5 + torch.rand(size, generator=draw)
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(size, generator=draw)

    def conv(name: str, before: int, after: int) -> None:
        state[f"{name}.weight"] = torch.randn(after, before, 3, 3, generator=draw) / 10

    conv("module.conv1", 3, width)
    norm("module.bn1", width)
    before = width
    for layer in (1, 2, 3):
        after = width * 2 ** (layer - 1)
        for block in range(blocks):
            for part in ("1", "2"):
                conv(f"module.layer{layer}.{block}.conv{part}", before, after)
                norm(f"module.layer{layer}.{block}.bn{part}", after)
                before = after
    state["module.linear.weight"] = torch.randn(10, 4 * width, generator=draw)
    state["module.linear.bias"] = torch.randn(10, generator=draw)
    return state


def by_the_book(state: dict[str, torch.Tensor], blocks: int, x: torch.Tensor) -> torch.Tensor:
    """Section 4.2 of the paper, one operation after the other."""
    own = {name.removeprefix("module."): value for name, value in state.items()}

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (
            own[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(y, mean, var, weight, bias)

    x = functional.relu(norm(functional.conv2d(x, own["conv1.weight"], padding=1), "bn1"))
    for layer in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = functional.conv2d(x, own[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = functional.relu(norm(y, f"{name}.bn1"))
            y = norm(functional.conv2d(y, own[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                quarter = y.shape[1] // 4
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = functional.relu(x + y)
    x = functional.avg_pool2d(x, x.shape[-1]).flatten(1)
    return functional.linear(x, own["linear.weight"], own["linear.bias"])


def test_it_computes_what_the_paper_says() -> None:
    state = state_dict(2, 8)
    model = CifarResnetForImageClassification(CifarResnetConfig(blocks=2, width=8, num_labels=10))
    model.load_state_dict(converted(state), strict=False)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model.eval()(pixels).logits
    torch.testing.assert_close(found, by_the_book(state, 2, pixels), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_state_dict_becomes_a_backbone(tmp_path: Path) -> None:
    torch.save({"state_dict": state_dict(3, 16), "best_prec1": 1.0}, tmp_path / "weights.th")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "weights.th"), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    backbone = find_backbone(f"path:{tmp_path / 'out'}")
    model = AutoModelForImageClassification.from_pretrained(backbone.folder)
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 million, as in the paper
    assert model.config.id2label[3] == "cat"


def test_another_network_is_refused(tmp_path: Path) -> None:
    state = state_dict(1, 8)
    del state["module.linear.bias"]
    torch.save(state, tmp_path / "weights.th")
    convert = runpy.run_path(str(SCRIPT))["convert"]
    with pytest.raises(SystemExit, match="not such a network"):
        convert(tmp_path / "weights.th", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights are not here (FEDGRAFT_DATA)")
def test_the_real_weights_go_in_exactly(tmp_path: Path) -> None:
    (source,) = REAL.glob("resnet20*.th")
    state = torch.load(source, weights_only=True, map_location="cpu")["state_dict"]
    model = CifarResnetForImageClassification(CifarResnetConfig(num_labels=10))
    model.load_state_dict(converted(state), strict=False)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model.eval()(pixels).logits
    torch.testing.assert_close(found, by_the_book(state, 3, pixels), rtol=1e-4, atol=1e-4)
