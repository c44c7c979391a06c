"""Folders that look like a model's, cheap to make and each with contents of its own."""

import hashlib
from pathlib import Path

import numpy as np

from fedgraft.common.backbones.manifest import CHUNK


def write_model(folder: Path, *, chunks: float = 2.5, seed: int = 0) -> Path:
    """A config, a vocabulary and weights of so many chunks of random bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "vocab.txt").write_text("a\nb\n")
    noise = np.random.default_rng(seed).bytes(int(chunks * CHUNK))
    (folder / "model.safetensors").write_bytes(noise)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file's SHA-256 by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def flip(path: Path, place: int) -> None:
    """Change one bit of a file that may be read-only."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
