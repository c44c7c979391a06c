"""Models of timm (VGG, Inception...), which transformers wraps: what they have elsewhere.

Their head is a module inside the wrapped model, and their folder's ``config.json`` says under
``pretrained_cfg`` how images are prepared, as timm's repositories on the hub have it.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedgraft.common.errors import BackboneError
from fedgraft.common.layout import TIMM_HEADS, TIMM_MODEL

__all__ = ["is_timm", "name_timm_labels", "timm_heads", "timm_pipeline"]


def is_timm(model: nn.Module) -> bool:
    """Whether ``model`` is transformers' wrapper around one of timm."""
    return hasattr(model, TIMM_MODEL)


def timm_heads(model: Any) -> tuple[str, ...]:
    """Names of the modules in ``model`` that are the classifier of the timm model it wraps.

    Raises:
        BackboneError: it has none, or in an unknown place.
    """
    found = model.timm_model.get_classifier()
    parts = found if isinstance(found, tuple) else (found,)
    places = {id(module): name for name, module in model.named_modules()}
    names = tuple(places.get(id(part), "") for part in parts)
    if unknown := [name for name in names if name not in TIMM_HEADS]:
        raise BackboneError(
            f"the classifier of this timm model is in an unknown place: {unknown[0] or 'nowhere'}",
            hint=f"known are: {', '.join(sorted(name.partition('.')[2] for name in TIMM_HEADS))}",
        )
    return names


def name_timm_labels(config: Any, labels: Sequence[str]) -> None:
    """Let a configuration say ``labels``: it would go on to be saved with those of its folder."""
    config.num_classes, config.label_names = len(labels), list(labels)


def timm_pipeline(config: Any) -> Any:
    """Resize, crop and normalise as the pre-training's evaluation did (``pretrained_cfg``).

    The resized side is the model's divided by ``crop_pct``; then the middle is cropped, with
    timm's defaults for what is not said.
    """
    from transformers import CLIPImageProcessorPil

    told = getattr(config, "pretrained_cfg", None) or {}
    side = int(told.get("input_size", (3, 224, 224))[-1])
    resample = {"nearest": 0, "bilinear": 2, "bicubic": 3}.get(str(told.get("interpolation")), 3)
    return CLIPImageProcessorPil(
        size={"shortest_edge": int(side / told.get("crop_pct", 0.875))},
        crop_size={"height": side, "width": side},
        resample=resample,
        image_mean=list(told.get("mean", (0.485, 0.456, 0.406))),
        image_std=list(told.get("std", (0.229, 0.224, 0.225))),
    )
