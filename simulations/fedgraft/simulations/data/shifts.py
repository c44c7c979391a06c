"""Covariate shifts: every simulated site sees the same task through a different camera.

A federation of identical sites shows little. Therefore each site gets an angle and one treatment,
which are the same for its whole data set. So p(image) differs between sites, but p(label | image)
does not. This is the feature-shift setting of X. Li et al., FedBN (ICLR 2021, arXiv:2102.07623).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

__all__ = ["KINDS", "WIDEST_ANGLE", "Shift", "draw_shifts"]

WIDEST_ANGLE = 30.0
"""Largest rotation that `draw_shifts` returns, in degrees."""

Pixels = NDArray[np.float64]  # [height, width] or [height, width, channels], in [0, 1]
Treatment = Callable[[Pixels, np.random.Generator], Pixels]


@dataclass(frozen=True)
class Shift:
    """The shift of one site's camera: rotate every image by `angle` degrees, then treat it.

    A positive angle is counter-clockwise; `kind`, the treatment, is a key of `KINDS`.

    Raises:
        ValueError: the kind is unknown, or the angle is not finite.
    """

    angle: float
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of shift {self.kind!r}; known are {', '.join(KINDS)}")
        if not np.isfinite(self.angle):
            raise ValueError(f"the angle of a shift must be finite, not {self.angle}")

    def describe(self) -> str:
        """Return the shift in words, such as "rotated -17 degrees, blurred"."""
        turned = round(self.angle)
        rotation = f"rotated {turned:+d} degrees" if turned else ""
        return ", ".join(filter(None, [rotation, KINDS[self.kind][0]])) or "unchanged"

    def apply(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Return a shifted copy of the same size and mode; new corners after rotation are black.

        `rng` is for treatments that differ from image to image; now this is only noise.

        Raises:
            ValueError: the image is neither grey nor colour (mode L or RGB).
        """
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"cannot shift an image of mode {image.mode}; convert it to L or RGB")
        turned = image.rotate(self.angle, Image.Resampling.BILINEAR)
        treated = KINDS[self.kind][1](np.asarray(turned) / 255.0, rng)
        return Image.fromarray(np.rint(treated.clip(0, 1) * 255).astype(np.uint8))


def draw_shifts(sites: int, rng: np.random.Generator) -> list[Shift]:
    """Draw one shift per site: angles at equal distances over +-30 degrees, kinds in turn.

    Angles and kinds are each in random order, independent of each other. A single site is not
    rotated.

    Raises:
        ValueError: there is less than one site.
    """
    if sites < 1:
        raise ValueError(f"cannot draw shifts for {sites} sites")
    angles = np.linspace(-WIDEST_ANGLE, WIDEST_ANGLE, sites) if sites > 1 else np.zeros(1)
    kinds = np.resize(list(KINDS), sites)
    pairs = zip(rng.permutation(angles), rng.permutation(kinds), strict=True)
    return [Shift(float(angle), str(kind)) for angle, kind in pairs]


def _reach(pixels: Pixels) -> float:
    """Return the radius in pixels for blurring and thickening: 0.8 for a side of 8, 4.5 for 224.

    It grows with the square root of the side, because larger images have more detail, not only
    more pixels of the same detail.
    """
    return 0.3 * float(np.sqrt(min(pixels.shape[:2])))


def _invert(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return 1 - pixels


def _blur(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return _filtered(ndimage.gaussian_filter(pixels, _reach(pixels), axes=(0, 1)))


def _dim(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return 0.25 + 0.4 * pixels


def _grain(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return pixels + rng.normal(0, 0.2, pixels.shape)


def _keep(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return pixels


def _thicken(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return _halfway(pixels, ndimage.grey_dilation)


def _thin(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return _halfway(pixels, ndimage.grey_erosion)


def _halfway(pixels: Pixels, morph: Callable[..., Any]) -> Pixels:
    """Return the mean of the image and its dilation or erosion.

    The mean is a smaller change than the smallest dilation or erosion, which is a whole pixel.
    """
    size = 1 + round(_reach(pixels))
    window = (size, size, 1)[: pixels.ndim]
    return (pixels + _filtered(morph(pixels, size=window))) / 2


def _filtered(result: Any) -> Pixels:
    return np.asarray(result, dtype=np.float64)


KINDS: dict[str, tuple[str, Treatment]] = {
    "invert": ("inverted", _invert),
    "blur": ("blurred", _blur),
    "noise": ("noisy", _grain),
    "dim": ("dimmed", _dim),
    "plain": ("", _keep),
    "thick": ("thickened", _thicken),
    "thin": ("thinned", _thin),
}
"""Every treatment: name, describing word, function. The names assume bright strokes."""
