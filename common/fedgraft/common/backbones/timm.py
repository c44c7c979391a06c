"""Models of timm (VGG, Inception...), wrapped by transformers: the differences to other models.

Their head is a module inside the wrapped model. ``pretrained_cfg`` in their ``config.json``
describes the preparation of images, as in timm's repositories on the hub.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedgraft.common.errors import BackboneError
from fedgraft.common.layout import TIMM_HEADS, TIMM_MODEL

__all__ = ["is_timm", "name_timm_labels", "timm_heads"]


def is_timm(model: nn.Module) -> bool:
    """Return whether ``model`` is transformers' wrapper around a timm model."""
    return hasattr(model, TIMM_MODEL)


def timm_heads(model: Any) -> tuple[str, ...]:
    """Return the names of the modules in ``model`` that form the wrapped timm model's classifier.

    Raises:
        BackboneError: there is none, or it is in an unknown place.
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
    """Set ``labels`` in a configuration; otherwise the labels of its folder would be saved.

    A task without labels has set the number of outputs, which stays as it is.
    """
    if labels:
        config.num_classes, config.label_names = len(labels), list(labels)
