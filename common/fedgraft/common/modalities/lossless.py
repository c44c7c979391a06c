"""Pictures of which a conversion to 8-bit colours would silently leave little or nothing.

A backbone reads 8 bits of grey or of red, green and blue. Files may hold more: 16 bits, a channel
of transparency, several pages. What a person sees in them must not be lost without a word.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from fedgraft.common.errors import DataError

__all__ = ["DEEP", "check_alpha", "check_colours", "check_levels", "check_pages"]

FAINT = 0xFFF  # 16-bit pixels up to this are of 12 bits or fewer: as 16 bits they would be black
BRIGHT = 1000  # a pixel in so many may be brighter: a hot pixel
FEW = 64  # levels of grey: 16-bit pixels that use 14 bits or fewer would have no more as 8 bits
SCALE = (
    "save it with 8 bits, or spread its values over all 16 bits (multiply 12-bit values by 16, "
    "14-bit values by 4)"
)
DEEP = "fedgraft:16-bit"  # the key of ``Image.info`` that open_image sets


def check_levels(values: NDArray[np.int64]) -> None:
    """Check that scaling 16-bit pixels to 8 bits leaves something of them.

    ``values`` are int64 [height, width] below 65,536. A picture of 12 or 14 bits in a 16-bit file
    has thousands of levels of grey, and few are left; so has one whose zero lies elsewhere. A mark
    that was burnt in or a hot pixel adds a level or two.

    Raises:
        DataError: most levels would be lost.
    """
    used = np.bincount(values.ravel(), minlength=1 << 16).astype(np.bool_)
    there, left = int(used.sum()), int(used.reshape(256, 256).any(axis=1).sum())
    faint = values.max() > 0 and np.count_nonzero(values > FAINT) * BRIGHT < values.size
    if not faint and (left > FEW or there <= 2 * left):
        return
    raise DataError(
        f"an image has 16-bit pixels, and its values are {values.min()} to {values.max()}: scaled "
        f"to 8 bits, {left} of its {there:,} levels of grey would be left",
        hint=SCALE,
    )


def check_colours(image: Pil.Image) -> None:
    """Check 16-bit colours, of which PIL gives the high bytes alone.

    Raises:
        DataError: they use 14 bits or fewer.
    """
    bands = "L" if image.mode in ("L", "LA") else "RGB"
    high = np.asarray(image.convert(bands))
    if int(high.max()) < FEW:
        raise DataError(
            f"an image has 16-bit colours, and their values are below {256 * (int(high.max()) + 1)}"
            ": scaled to 8 bits it would be dark or black",
            hint=SCALE,
        )


def check_alpha(image: Pil.Image) -> None:
    """Check that an image is not drawn by its transparency alone, which no backbone reads.

    Raises:
        DataError: what is visible has one colour, and the transparency varies.
    """
    pixels = np.asarray(image.convert("RGBA"))
    visible = pixels[pixels[..., 3] > 0][:, :3]
    if np.ptp(pixels[..., 3]) and (not len(visible) or not np.ptp(visible, axis=0).any()):
        raise DataError(
            "an image has its picture in the alpha channel alone",
            hint="flatten it on a background, and save it without transparency",
        )


def check_pages(image: Pil.Image) -> None:
    """Check that a file is one picture; phones put a second, smaller one into a JPEG file.

    Raises:
        DataError: there are several pages or frames of one size.
    """
    count = getattr(image, "n_frames", 1)
    if image.format in ("JPEG", "MPO") or count == 1:
        return
    size = image.size
    image.seek(1)
    alike = image.size == size
    image.seek(0)
    if alike:
        raise DataError(
            f"has {count} pages or frames, and one would be read",
            hint="save those that belong to the data as files of their own",
        )
