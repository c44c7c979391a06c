"""ResNets for small images, as in He et al. 2016 on CIFAR-10, for weights from other projects.

He et al., "Deep Residual Learning for Image Recognition", section 4.2: a 3x3 stem without pooling,
three stages of n blocks with 16, 32 and 64 channels, and shortcuts without parameters (option A:
every second pixel, zeros for new channels). transformers' own ResNet begins with a 7x7 stem of
stride 2 and pooling, so these weights do not fit it. The import of this module registers the
architecture in transformers' Auto classes under the name ``cifar_resnet``.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

__all__ = ["CifarResnetConfig", "CifarResnetForImageClassification", "converted"]

STEMS = {"bn1": "norm1", "bn2": "norm2"}


class CifarResnetConfig(PretrainedConfig):
    """``blocks`` in each of three stages; their channels are ``width`` times 1, 2 and 4."""

    model_type = "cifar_resnet"
    blocks: int = 3
    width: int = 16
    num_channels: int = 3
    image_size: int = 32


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride, self.new = stride, after - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` [b, before, h, w] to [b, after, h / stride, w / stride]."""
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        around = self.new // 2
        return functional.relu(y + functional.pad(x, (0, 0, 0, 0, around, around)))


class _Body(nn.Module):
    def __init__(self, config: CifarResnetConfig) -> None:
        super().__init__()
        width = config.width
        self.stem = nn.Conv2d(config.num_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        channels = [width, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    _Block(
                        channels[stage if block == 0 else stage + 1],
                        channels[stage + 1],
                        2 if stage and block == 0 else 1,
                    )
                    for block in range(config.blocks)
                )
            )
            for stage in range(3)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [b, 4 x width] of images [b, channels, h, w]."""
        hidden = functional.relu(self.norm(self.stem(pixels)))
        for stage in self.stages:
            hidden = stage(hidden)
        return hidden.mean((2, 3))


class CifarResnetForImageClassification(PreTrainedModel):
    """The body with a linear classifier on its features."""

    config_class = CifarResnetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResnetConfig) -> None:
        super().__init__(config)
        self.resnet = _Body(config)
        self.classifier = nn.Linear(4 * config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):  # as in He et al. 2015
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> ImageClassifierOutput:
        """Return logits [b, labels] of normalised images [b, channels, h, w]."""
        return ImageClassifierOutput(logits=self.classifier(self.resnet(pixel_values)))


def converted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with this module's names, from the usual names of such networks.

    The usual names are ``conv1``, ``bn1``, ``layer1.0.conv1``, ``layer1.0.bn1`` and so on, and
    ``linear``. A leading ``module.``, which parallel training adds, is removed.
    """
    found = {}
    for name, tensor in state.items():
        first, *rest = name.removeprefix("module.").split(".")
        if first == "linear":
            path = ["classifier", *rest]
        elif first.startswith("layer"):
            block, inner, *last = rest
            path = [
                "resnet",
                "stages",
                str(int(first[5:]) - 1),
                block,
                STEMS.get(inner, inner),
                *last,
            ]
        else:
            path = ["resnet", {"conv1": "stem", "bn1": "norm"}[first], *rest]
        found[".".join(path)] = tensor.contiguous()
    return found


AutoConfig.register("cifar_resnet", CifarResnetConfig, exist_ok=True)
AutoModelForImageClassification.register(
    CifarResnetConfig, CifarResnetForImageClassification, exist_ok=True
)
