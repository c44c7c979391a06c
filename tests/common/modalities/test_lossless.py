"""Pictures of which little would be left are refused, and what is whole is read."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedgraft.common.errors import DataError
from fedgraft.common.modalities.image import open_image, to_channels

COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's type of colour, by the number of channels


def png16(values: NDArray[Any]) -> bytes:
    """A PNG file with 16 bits a channel; ``values`` are [height, width, channels]."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, COLOURS[channels], 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read(data: bytes, channels: int = 3) -> NDArray[np.uint8]:
    return np.asarray(to_channels(open_image({"bytes": data, "path": None}), channels))


def saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def ramp(low: int, high: int, channels: int = 1, opaque: bool = True) -> NDArray[np.int64]:
    values = np.tile(np.linspace(low, high, 256).astype(np.int64)[None, :, None], (64, 1, channels))
    if channels in (2, 4) and opaque:
        values[..., -1] = 0xFFFF
    return values


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [1, 8, 10, 12, 13, 14])
def test_few_bits_in_sixteen_are_refused(bits: int, channels: int) -> None:
    with pytest.raises(DataError, match="scaled to 8 bits") as caught:
        read(png16(ramp(0, (1 << bits) - 1, channels)))
    assert "multiply 12-bit values by 16" in caught.value.hint


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("high", [0x7FFF, 0xFFFF])
def test_what_uses_its_sixteen_bits_is_read(high: int, channels: int) -> None:
    values = ramp(0, high, channels)
    found = read(png16(values), 3)
    np.testing.assert_array_equal(found, np.repeat(values[..., :1] >> 8, 3, axis=2))


@pytest.mark.parametrize(
    ("low", "high"), [(32768 - 1000, 32768 + 1000), (30000, 30255), (65000, 65535)]
)
def test_a_narrow_range_anywhere_is_refused(low: int, high: int) -> None:
    """Values of CT, which are stored with 32768 added, and detectors with an offset."""
    with pytest.raises(DataError, match=f"values are {low} to {high}: scaled to 8 bits"):
        read(png16(ramp(low, high)))


def test_a_mark_that_was_burnt_in_does_not_hide_it() -> None:
    values = ramp(0, 4095)
    values[:16, :16] = 0xFFFF
    with pytest.raises(DataError, match="17 of its 257 levels of grey would be left"):
        read(png16(values))


def test_few_levels_that_stay_apart_are_no_loss() -> None:
    values = np.zeros((8, 8, 1), np.int64)
    values[2:4] = 0xFFFF
    assert set(read(png16(values)).ravel()) == {0, 255}
    assert not read(png16(np.zeros((8, 8, 1), np.int64))).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_picture_of_transparency_alone_is_refused(mode: str) -> None:
    pixels = np.zeros((32, 32, len(mode)), np.uint8)
    pixels[8:24, 8:24, -1] = 255
    with pytest.raises(DataError, match="in the alpha channel alone") as caught:
        read(saved(Image.fromarray(pixels), "PNG"))
    assert "flatten" in caught.value.hint
    pixels[:, :16, 0] = 200
    assert read(saved(Image.fromarray(pixels), "PNG")).max() == 200
    pixels[..., -1] = 255
    pixels[..., 0] = 7
    assert read(saved(Image.fromarray(pixels), "PNG")).max() == 7


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_pages_beyond_the_first_are_not_lost_in_silence(kind: str) -> None:
    first, *others = (Image.new("L", (8, 8), grey) for grey in (0, 120, 255))
    with pytest.raises(DataError, match="has 3 pages or frames, and one would be read") as caught:
        read(saved(first, kind, save_all=True, append_images=others))
    assert "files of their own" in caught.value.hint
    read(saved(first, kind))


def test_a_small_copy_beside_a_picture_is_no_page() -> None:
    """A TIFF file may hold a preview, and a phone's JPEG file a second picture."""
    whole, preview = Image.new("L", (8, 8), 9), Image.new("L", (4, 4), 200)
    for kind in ("TIFF", "MPO"):
        data = saved(whole, kind, save_all=True, append_images=[preview])
        assert read(data).shape == (8, 8, 3) and read(data).max() < 12
