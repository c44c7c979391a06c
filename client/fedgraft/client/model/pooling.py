"""The feature of an example: one vector from the activations at its positions."""

import torch

__all__ = ["pooled"]


def pooled(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return means [b, d] over the positions of ``mask`` [b, p], or over all positions without it.

    ``hidden`` is [b, p, d], [b, d, h, w] or [b, d]; a mask needs the first of these.
    """
    if mask is not None:
        weights = mask.to(hidden)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1)
    if hidden.ndim == 3:
        return hidden.mean(1)
    return hidden.flatten(2).mean(2) if hidden.ndim > 3 else hidden
