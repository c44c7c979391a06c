"""Wav files for tests: tones, of which a small model can tell the pitch."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile

__all__ = ["LABELS", "tone", "write_tones", "write_wav"]

LABELS = ("low", "high")
PITCH = {"low": 300.0, "high": 1200.0}  # Hz


def tone(
    pitch: float, *, seconds: float = 0.3, rate: int = 8000, phase: float = 0.0
) -> NDArray[np.float64]:
    """A sine in [-0.5, 0.5]."""
    times = np.arange(round(seconds * rate)) / rate
    return np.asarray(0.5 * np.sin(2 * np.pi * pitch * times + phase))


def write_wav(path: Path, samples: NDArray[Any], rate: int = 8000) -> Path:
    """Samples in [-1, 1] as 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, (np.asarray(samples) * 32767).astype(np.int16))
    return path


def write_tones(folder: Path, count: int, *, seed: int = 0) -> Path:
    """``count`` tones of each label in a folder per label, of different length and loudness."""
    draw = np.random.default_rng(seed)
    for label, pitch in PITCH.items():
        for number in range(count):
            length, phase = draw.uniform(0.15, 0.35), draw.uniform(0, 6)
            samples = tone(pitch * draw.uniform(0.9, 1.1), seconds=length, phase=phase)
            noisy = samples * draw.uniform(0.3, 1) + draw.normal(0, 0.02, len(samples))
            write_wav(folder / label / f"{number:02d}.wav", noisy.clip(-1, 1))
    return folder
