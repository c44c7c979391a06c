"""Models that paint hidden patches of images: what their configuration and output have to be."""

from typing import Any

import torch

from fedgraft.common.errors import BackboneError

__all__ = ["PAINTERS", "cut_patches", "painting_settings", "predicted"]

PAINTERS = ("deit", "vit")
"""Kinds of models of transformers whose patches in and out are of one size."""


def painting_settings(config: dict[str, Any], source: str) -> dict[str, Any]:
    """What a backbone's ``config.json`` needs to say besides, so that it paints whole images.

    Raises:
        BackboneError: it is of a kind that was not tried.
    """
    kind = config.get("model_type")
    if kind not in PAINTERS or not isinstance(config.get("patch_size"), int):
        raise BackboneError(
            f"{source} is of the kind {kind!r}, whose patches cannot be hidden here",
            hint=f"a model of a kind that can: {', '.join(PAINTERS)}",
        )
    return {"encoder_stride": config["patch_size"]}


def predicted(output: Any, model: Any) -> torch.Tensor:
    """What a model says, float: logits, or the patches that it paints, [b, patches, values]."""
    painted: torch.Tensor | None = getattr(output, "reconstruction", None)
    if painted is not None:
        return cut_patches(painted, int(model.config.patch_size)).float()
    logits: torch.Tensor = output.logits
    return logits.float()


def cut_patches(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Images [b, c, h, w] in patches, row by row: [b, patches, c x side x side]."""
    return torch.nn.functional.unfold(pixels, side, stride=side).transpose(1, 2)
