"""Small clips: a bright square that goes left or right."""

from pathlib import Path

import numpy as np

__all__ = ["LABELS", "write_clip", "write_clips"]

LABELS = ("left", "right")
SIDE, FRAMES = 32, 9


def write_clip(path: Path, *, right: bool, seed: int, frames: int = FRAMES) -> None:
    """One clip; where the square starts and how fast it goes is drawn."""
    import av

    draw = np.random.default_rng(seed)
    row, speed = int(draw.integers(0, SIDE - 8)), int(draw.integers(2, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
            at = min(speed * number, SIDE - 8)
            at = at if right else SIDE - 8 - at
            pixels[row : row + 8, at : at + 8] = (255, 170, 85)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_clips(folder: Path, count: int, *, seed: int = 0) -> None:
    """``count`` of each label, in folders of their names."""
    for number in range(count):
        for label in LABELS:
            path = folder / label / f"{number:03d}.mp4"
            write_clip(path, right=label == "right", seed=1000 * seed + number)
