"""Every random number comes from a seed that is a hash of its purpose, never a global generator.

So a site's batches in round 7 are always the same. They do not depend on the other sites in the
round, on the order or process of the sites, or on a restart.
"""

import hashlib

import numpy as np
import torch

__all__ = ["derive_seed", "numpy_generator", "torch_generator"]


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """Hash ``run_seed`` and the purpose of the seed into 63 bits (SHA-256, injective encoding)."""
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a separate numpy generator for this purpose."""
    return np.random.default_rng(derive_seed(run_seed, *purpose))


def torch_generator(
    run_seed: int, *purpose: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a separate torch generator for this purpose, on ``device``."""
    return torch.Generator(device=device).manual_seed(derive_seed(run_seed, *purpose))
