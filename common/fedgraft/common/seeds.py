"""Every random number comes from a seed hashed from what it is for, never from a global generator.

A site's batches in round 7 are then the same whoever else took part, in whatever order or
process the sites ran, and after any restart. torch is imported when a generator of it is wanted:
a job is read without.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["derive_seed", "numpy_generator", "torch_generator"]


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """Hash ``run_seed`` and what the seed is for into 63 bits (SHA-256, injective encoding)."""
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator of its own for this purpose."""
    return np.random.default_rng(derive_seed(run_seed, *purpose))


def torch_generator(
    run_seed: int, *purpose: str | int, device: "torch.device | str" = "cpu"
) -> "torch.Generator":
    """A torch generator of its own for this purpose, on ``device``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(run_seed, *purpose))
