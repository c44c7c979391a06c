"""Models of timm (VGG, Inception...), which transformers wraps: what they have elsewhere.

Their head is a module inside the wrapped model, and their folder's ``config.json`` says under
``pretrained_cfg`` how images are prepared, as timm's repositories on the hub have it.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedgraft.common.errors import BackboneError
from fedgraft.common.layout import TIMM_HEADS, TIMM_MODEL

__all__ = ["is_timm", "name_timm_labels", "timm_heads"]


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
