"""Each random number comes from a seed that is a hash of its purpose; there is no global generator.

So a site's batches in round 7 do not depend on the other sites, on the order or the process of the
sites, or on a restart. A job is read without torch: torch is imported only for a torch generator.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["derive_seed", "numpy_generator", "torch_generator"]


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """Return a seed of 63 bits: a SHA-256 of ``run_seed`` and the purpose (injective encoding)."""
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a new numpy generator for this purpose."""
    return np.random.default_rng(derive_seed(run_seed, *purpose))


def torch_generator(
    run_seed: int, *purpose: str | int, device: "torch.device | str" = "cpu"
) -> "torch.Generator":
    """Return a new torch generator for this purpose, on ``device``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(run_seed, *purpose))
