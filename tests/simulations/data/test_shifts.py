"""Shifts must keep the image's form, follow their seed, and differ between sites."""

import numpy as np
import pytest
from PIL import Image

from fedgraft.simulations.data.shifts import KINDS, Shift, draw_shifts


def picture(height: int = 8, width: int = 8, mode: str = "L") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("height", "width", "mode"), [(8, 8, "L"), (28, 28, "L"), (40, 64, "RGB"), (1, 3, "L")]
)
def test_a_shift_keeps_size_and_mode_and_follows_its_seed(
    kind: str, height: int, width: int, mode: str
) -> None:
    image = picture(height, width, mode)
    before = image.tobytes()
    first, again = (Shift(20, kind).apply(image, np.random.default_rng(1)) for _ in range(2))
    assert (first.size, first.mode) == (image.size, image.mode)
    assert first.tobytes() == again.tobytes()
    assert image.tobytes() == before


def test_only_the_plain_upright_shift_changes_nothing() -> None:
    image = picture()
    for kind in KINDS:
        shifted = Shift(0, kind).apply(image, np.random.default_rng(0))
        assert (shifted.tobytes() == image.tobytes()) == (kind == "plain")


def test_rotation_is_counter_clockwise() -> None:
    image = Image.new("L", (9, 9))
    image.putpixel((4, 0), 255)
    turned = pixels(Shift(90, "plain").apply(image, np.random.default_rng(0)))
    assert turned[4, 0] == turned.max() > 0


def test_each_treatment_does_what_its_name_says() -> None:
    image = Image.new("L", (8, 8))
    image.paste(200, (3, 1, 5, 7))
    seen = {kind: pixels(Shift(0, kind).apply(image, np.random.default_rng(0))) for kind in KINDS}
    plain = seen["plain"]
    assert np.array_equal(seen["invert"], 255 - plain)
    assert np.ptp(seen["blur"]) < np.ptp(plain)
    assert np.ptp(seen["dim"]) == pytest.approx(0.4 * np.ptp(plain), abs=1)
    assert np.all(seen["thin"] <= plain) and np.all(plain <= seen["thick"])
    assert seen["thin"].sum() < plain.sum() < seen["thick"].sum()


def test_noise_differs_from_image_to_image() -> None:
    rng = np.random.default_rng(0)
    first, second = (Shift(0, "noise").apply(picture(), rng) for _ in range(2))
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (Shift(-17.2, "blur"), "rotated -17 degrees, blurred"),
        (Shift(3, "plain"), "rotated +3 degrees"),
        (Shift(0, "invert"), "inverted"),
        (Shift(-0.2, "plain"), "unchanged"),
    ],
)
def test_describe(shift: Shift, words: str) -> None:
    assert shift.describe() == words


def test_ten_sites_get_even_angles_and_every_kind() -> None:
    shifts = draw_shifts(10, np.random.default_rng(0))
    assert np.allclose(sorted(shift.angle for shift in shifts), np.linspace(-30, 30, 10))
    assert {shift.kind for shift in shifts} == set(KINDS)
    assert shifts == draw_shifts(10, np.random.default_rng(0))
    assert shifts != draw_shifts(10, np.random.default_rng(1))


def test_a_single_site_is_not_rotated() -> None:
    assert draw_shifts(1, np.random.default_rng(0))[0].angle == 0


def test_bad_values_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown kind of shift 'sepia'"):
        Shift(0, "sepia")
    with pytest.raises(ValueError, match="finite"):
        Shift(float("nan"), "plain")
    with pytest.raises(ValueError, match="mode P"):
        Shift(0, "plain").apply(Image.new("P", (8, 8)), rng)
    with pytest.raises(ValueError, match="0 sites"):
        draw_shifts(0, rng)
