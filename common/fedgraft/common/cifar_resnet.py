"""The import path in model cards of published adapters; the code is in ``backbones``."""

from fedgraft.common.backbones.cifar_resnet import (
    CifarResnetConfig,
    CifarResnetForImageClassification,
    converted,
)

__all__ = ["CifarResnetConfig", "CifarResnetForImageClassification", "converted"]
