"""Drawn digits: the source domain of the demonstration, made of strokes instead of photographs.

A digit has several ways of writing, given as polylines in the unit square. A drawing warps, shears,
rotates and scales the lines of one way of writing. It takes the distance of every sample point to
the nearest line, inks the points within the pen's radius, and averages blocks of samples into grey
pixels. The last step is the same as for the real target images, which are bitmaps normalised to
full height and counted in blocks (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI, 1998).

The given generator is the only source of randomness, so a seed gives the same images on every run.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SIDE", "draw"]

SIDE = 8
"""Height and width of an image in pixels."""

_SAMPLES = 16  # sample points per side: 2 x 2 of them make one pixel
_CHUNK = 64  # drawings rasterised at once: keeps the temporary arrays within a few megabytes

Points = NDArray[np.float64]


def draw(
    count: int,
    rng: np.random.Generator,
    *,
    rotation: float = 12.0,
    warp: float = 0.06,
    thickness: tuple[float, float] = (0.045, 0.085),
    noise: float = 0.08,
    inverted: float = 0.3,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw `count` digits and return (images [count, 8, 8] in [0, 1], labels [count] in 0..9).

    `rotation` is the standard deviation of the angle in degrees. `warp` is the standard deviation
    of the bending, and `thickness` the range of the pen's radius, both in units of the image's
    side; narrow drawings may get up to twice that radius. `noise` is the standard deviation of the
    noise on a pixel. `inverted` is the share of drawings with dark ink on a bright background. The
    labels are drawn uniformly.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"cannot draw {count} digits")
    labels = rng.integers(0, 10, count)
    writing = _TABLE.first[labels] + rng.integers(0, _TABLE.ways[labels])
    points = _slant(_bend(_TABLE.points[writing], warp, rng), rotation, rng)
    radius = _broaden(rng.uniform(*thickness, count), points, rng)
    points = _place(points, radius, rng)
    row = np.arange(count)[:, None]
    starts, ends = points[row, _TABLE.starts[writing]], points[row, _TABLE.ends[writing]]
    return _expose(_ink(starts, ends, radius), noise, inverted, rng), labels


def _bend(points: Points, warp: float, rng: np.random.Generator) -> Points:
    """Bend every drawing by slow sine waves, and move its points a little at random."""
    amplitude = rng.normal(0, warp, (4, len(points), 1))
    phase = rng.uniform(0, 2 * np.pi, (4, len(points), 1))
    slow, fast = 3.0, 5.0  # radians per side: less than one full wave, so strokes keep their order
    x, y = points[..., 0], points[..., 1]
    wave = [
        amplitude[i] * np.sin(rate * along + phase[i])
        for i, (rate, along) in enumerate([(slow, y), (fast, x), (slow, x), (fast, y)])
    ]
    bend = np.stack([wave[0] + wave[1], wave[2] + wave[3]], axis=-1)
    bent: Points = points + bend + rng.normal(0, 0.015, points.shape)
    return bent


def _slant(points: Points, rotation: float, rng: np.random.Generator) -> Points:
    """Rotate, shear and narrow every drawing about the middle of the unit square."""
    count = len(points)
    angle = np.deg2rad(rng.normal(0, rotation, (count, 1)))
    shear = rng.normal(0, 0.15, (count, 1))
    width = rng.uniform(0.7, 1.05, (count, 1))
    x, y = points[..., 0] - 0.5, points[..., 1] - 0.5
    slanted_x = np.cos(angle) * width * x + (shear - np.sin(angle)) * y
    slanted_y = np.sin(angle) * width * x + np.cos(angle) * y
    return np.stack([slanted_x, slanted_y], axis=-1)


def _broaden(
    radius: NDArray[np.float64], points: Points, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the pen's radii; narrow drawings get a broader pen, up to twice the radius.

    In the real set, a narrow digit has as much ink as a wide digit, as if it had been stretched.
    """
    width, height = np.moveaxis(np.ptp(points, axis=1), -1, 0)
    narrowness = (0.6 * height / np.maximum(width, 1e-6)).clip(1, 2)
    broadened: NDArray[np.float64] = radius * narrowness ** rng.uniform(0, 1, len(radius))
    return broadened


def _place(points: Points, radius: NDArray[np.float64], rng: np.random.Generator) -> Points:
    """Scale every drawing to nearly full height, or to full width if it is wide, and centre it."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    extent = high - low
    pen = 2 * radius[:, None]
    to_height = (0.97 - pen) / extent[..., 1] * rng.uniform(0.92, 1.03, (len(points), 1))
    to_width = (1.0 - pen) / extent[..., 0]
    scale = np.minimum(to_height, to_width)[..., None]
    centre = 0.5 + rng.normal(0, 0.02, (len(points), 1, 2))
    placed: Points = (points - (low + high) / 2) * scale + centre
    return placed


def _ink(starts: Points, ends: Points, radius: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rasterise line segments [count, segments, 2] into coverage [count, 8, 8] in [0, 1]."""
    centres = ((np.arange(_SAMPLES) + 0.5) / _SAMPLES).astype(np.float32)
    x, y = np.tile(centres, _SAMPLES), np.repeat(centres, _SAMPLES)
    images = np.empty((len(starts), SIDE, SIDE), np.float32)
    for begin in range(0, len(starts), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        a, b = starts[part, :, None].astype(np.float32), ends[part, :, None].astype(np.float32)
        distance = np.sqrt(_squared_distance(x, y, a, b).min(axis=1))
        # The pen's edge is soft by half a sample, against staircases in the image.
        ink = ((radius[part, None].astype(np.float32) - distance) * _SAMPLES + 0.5).clip(0, 1)
        blocks = ink.reshape(-1, SIDE, _SAMPLES // SIDE, SIDE, _SAMPLES // SIDE)
        images[part] = blocks.mean(axis=(2, 4))
    return images


def _squared_distance(
    x: NDArray[np.float32], y: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return squared distances of points (x, y) [samples] to segments [count, segments, 1, 2].

    The segments go from ``a`` to ``b``.
    """
    along_x, along_y = b[..., 0] - a[..., 0], b[..., 1] - a[..., 1]
    from_x, from_y = x - a[..., 0], y - a[..., 1]
    length = np.maximum(along_x * along_x + along_y * along_y, 1e-8)
    nearest = ((from_x * along_x + from_y * along_y) / length).clip(0, 1)
    off_x, off_y = from_x - nearest * along_x, from_y - nearest * along_y
    squared: NDArray[np.float32] = off_x * off_x + off_y * off_y
    return squared


def _expose(
    coverage: NDArray[np.float32], noise: float, inverted: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Vary the brightness, add noise, and invert some images."""
    gain = rng.uniform(0.95, 1.25, (len(coverage), 1, 1))
    grainy = (coverage * gain).clip(0, 1) + rng.normal(0, noise, coverage.shape)
    images = grainy.clip(0, 1)
    negative = rng.random(len(images)) < inverted
    images[negative] = 1 - images[negative]
    return images.astype(np.float32)


# --- the ways of writing ---------------------------------------------------------------------
# x grows to the right and y downwards. A stroke is an array of points [points, 2].


def _line(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=np.float64)


def _arc(
    x: float, y: float, wide: float, high: float, start: float, stop: float, points: int = 13
) -> Points:
    """Return part of an ellipse around (x, y), from angle `start` to `stop` in degrees.

    An angle of 0 is right and 90 is up.
    """
    angle = np.deg2rad(np.linspace(start, stop, points))
    return np.stack([x + wide * np.cos(angle), y - high * np.sin(angle)], axis=-1)


def _join(*strokes: Points) -> Points:
    return np.concatenate(strokes)


def _writings() -> Iterator[tuple[int, list[Points]]]:
    """Yield every way of writing, as (digit, strokes), in the order of the digits."""
    yield 0, [_arc(0.5, 0.5, 0.34, 0.5, 90, 450, 25)]
    yield 0, [_arc(0.5, 0.5, 0.24, 0.5, 70, 430, 25)]

    yield 1, [_line((0.5, 0), (0.5, 1))]
    yield 1, [_line((0.25, 0.25), (0.52, 0), (0.52, 1))]
    yield 1, [_line((0.25, 0.25), (0.52, 0), (0.52, 1)), _line((0.22, 1), (0.82, 1))]
    yield 1, [_line((0.62, 0), (0.42, 1))]
    yield 1, [_line((0.1, 0.42), (0.55, 0), (0.55, 1))]
    yield 1, [_line((0.1, 0.4), (0.5, 0), (0.5, 1)), _line((0.15, 1), (0.85, 1))]

    yield 2, [_join(_arc(0.5, 0.28, 0.33, 0.28, 160, -35), _line((0.15, 1), (0.87, 1)))]
    looped = _arc(0.3, 0.86, 0.16, 0.13, 120, 330, 9)
    yield 2, [_join(_arc(0.48, 0.26, 0.3, 0.26, 150, -50), looped, _line((0.88, 0.97)))]

    yield 3, [_join(_arc(0.45, 0.25, 0.32, 0.25, 150, -80), _arc(0.45, 0.74, 0.36, 0.26, 80, -150))]
    yield 3, [_line((0.15, 0), (0.8, 0), (0.45, 0.4)), _arc(0.43, 0.69, 0.38, 0.31, 90, -140)]

    yield 4, [_line((0.62, 0), (0.1, 0.62), (0.92, 0.62)), _line((0.66, 0.35), (0.66, 1))]
    yield 4, [_line((0.22, 0), (0.16, 0.5), (0.84, 0.5)), _line((0.8, 0), (0.7, 1))]
    yield 4, [_line((0.6, 1), (0.6, 0), (0.1, 0.65), (0.92, 0.65))]

    belly = _arc(0.45, 0.68, 0.36, 0.31, 120, -150)
    yield 5, [_join(_line((0.85, 0), (0.25, 0), (0.2, 0.43)), belly)]
    belly = _arc(0.44, 0.72, 0.34, 0.28, 110, -130)
    yield 5, [_line((0.82, 0.02), (0.3, 0.02)), _join(_line((0.3, 0.02), (0.26, 0.45)), belly)]

    stem = _arc(0.8, 0.6, 0.62, 0.6, 100, 180, 9)
    yield 6, [_join(stem, _arc(0.48, 0.7, 0.3, 0.3, 180, 540, 19))]
    stem = _line((0.55, 0), (0.3, 0.35), (0.2, 0.65))
    yield 6, [_join(stem, _arc(0.48, 0.72, 0.28, 0.27, 180, 530, 19))]

    yield 7, [_line((0.12, 0.03), (0.86, 0.03), (0.4, 1))]
    yield 7, [_line((0.12, 0.03), (0.86, 0.03), (0.45, 1)), _line((0.25, 0.52), (0.85, 0.5))]
    flag = _line((0.12, 0.15), (0.15, 0.03), (0.85, 0.03))
    yield 7, [_join(flag, _arc(1.1, 1, 0.68, 0.75, 130, 180, 7))]

    yield 8, [_arc(0.5, 0.25, 0.26, 0.25, 0, 360, 19), _arc(0.5, 0.75, 0.33, 0.25, 0, 360, 19)]
    lower = _arc(0.5, 0.75, 0.28, 0.25, 70, -250, 16)
    closing = _arc(0.5, 0.25, 0.26, 0.24, -60, 40, 6)
    yield 8, [_join(_arc(0.5, 0.25, 0.26, 0.24, 40, 250, 10), lower, closing)]

    bowl = _arc(0.48, 0.3, 0.3, 0.29, 0, 360, 19)
    yield 9, [_join(bowl, _line((0.76, 0.6), (0.7, 1)))]
    yield 9, [_join(bowl, _arc(0.4, 0.65, 0.4, 0.35, 10, -120, 8))]


class _Table(NamedTuple):
    """All ways of writing, padded to one shape, so that array operations draw a batch."""

    points: Points  # [writings, points, 2]
    starts: NDArray[np.int64]  # [writings, segments], index of each segment's first point
    ends: NDArray[np.int64]  # [writings, segments], index of its second point
    first: NDArray[np.int64]  # [10], row of each digit's first way of writing
    ways: NDArray[np.int64]  # [10], number of ways to write each digit


def _tabulate(writings: Sequence[tuple[int, list[Points]]]) -> _Table:
    points, starts = [], []
    for _, strokes in writings:
        points.append(np.concatenate(strokes))
        last = np.cumsum([len(stroke) for stroke in strokes]) - 1
        starts.append(np.setdiff1d(np.arange(len(points[-1])), last))

    def pad(arrays: list[NDArray[np.float64]] | list[NDArray[np.int64]]) -> Points:
        # Repeated last entries change neither the outline nor the bounding box.
        size = max(map(len, arrays))
        return np.stack([a[np.minimum(np.arange(size), len(a) - 1)] for a in arrays])

    begin = pad(starts).astype(np.int64)
    ways = np.bincount([digit for digit, _ in writings], minlength=10)
    return _Table(pad(points), begin, begin + 1, np.cumsum(ways) - ways, ways)


_TABLE = _tabulate(list(_writings()))
