"""The import path that model cards of published adapters name, and what stands behind it."""

from fedgraft.common.backbones.cifar_resnet import (
    CifarResnetConfig,
    CifarResnetForImageClassification,
    converted,
)

__all__ = ["CifarResnetConfig", "CifarResnetForImageClassification", "converted"]
