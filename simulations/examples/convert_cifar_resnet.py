"""Make a backbone folder of a ResNet-20 (32, 44, 56, 110) that was trained on CIFAR-10 elsewhere.

    python simulations/examples/convert_cifar_resnet.py resnet20-12fca82f.th backbones/resnet20

The state dict has the usual names (``module.layer1.0.conv1.weight``...), as in the repository
akamaster/pytorch_resnet_cifar10. It is read without running any code in it.
"""

import argparse
import json
from pathlib import Path

import torch

from fedgraft.common.backbones.cifar_resnet import (
    CifarResnetConfig,
    CifarResnetForImageClassification,
    converted,
)

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What those networks were trained with: ImageNet's mean and deviation.
PIXELS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert(source: Path, folder: Path) -> None:
    """Write ``folder`` from the state dict in ``source``."""
    loaded = torch.load(source, weights_only=True, map_location="cpu")
    state = converted(loaded.get("state_dict", loaded))
    blocks = 1 + max(int(name.split(".")[3]) for name in state if ".stages." in name)
    width = state["resnet.stem.weight"].shape[0]
    config = CifarResnetConfig(blocks=blocks, width=width, id2label=dict(enumerate(LABELS)))
    config.label2id = {name: index for index, name in enumerate(LABELS)}
    model = CifarResnetForImageClassification(config)
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - counters or unexpected:
        raise SystemExit(f"not such a network: {[*missing, *unexpected][:3]}")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    convert(options.source, options.folder)
    print(f"{options.folder}: use it as path:{options.folder}")
