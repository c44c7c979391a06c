"""Tokenizers and image pipelines from local folders, without remote code or torchvision."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.modalities import load_processor
from fedgraft.common.modalities.image import ImageProcessor, open_image, to_channels
from fedgraft.common.modalities.text import TextProcessor

CONFIG = SimpleNamespace(num_channels=1, image_size=8)


def save_tokenizer(folder: Path, **config: Any) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, "good": 3, "bad": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_pipeline(folder: Path, **config: Any) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", **config}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def load_text(folder: Path, config: Any = None) -> TextProcessor:
    processor = load_processor(folder, "text", config)
    assert isinstance(processor, TextProcessor)
    return processor


def load_image(folder: Path, config: Any = CONFIG) -> ImageProcessor:
    processor = load_processor(folder, "image", config)
    assert isinstance(processor, ImageProcessor)
    return processor


def test_a_tokenizer_is_loaded_with_its_limits(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad_token="[PAD]", padding_side="left", model_max_length=64)
    processor = load_text(tmp_path, SimpleNamespace(max_position_embeddings=32))
    assert (processor.pad_id, processor.pad_left, processor.limit) == (0, True, 32)
    assert processor.tokenize(["good bad good", "x"], 2)["input_ids"] == [[3, 4], [1]]
    assert processor.identity == load_text(tmp_path).identity


def test_without_padding_token_the_end_of_text_pads(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, eos_token="[END]")
    processor = load_text(tmp_path)
    assert (processor.pad_id, processor.limit) == (2, None)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(BackboneError, match="neither a padding") as caught:
        load_text(tmp_path)
    assert "pad_token" in caught.value.hint


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="has no tokenizer") as caught:
        load_text(tmp_path)
    assert "tokenizer.json" in caught.value.hint
    save_tokenizer(tmp_path, pad_token="[PAD]")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BackboneError, match="does not load"):
        load_text(tmp_path)


def test_plain_pixels_are_resized_and_scaled(tmp_path: Path) -> None:
    processor = load_image(tmp_path)
    pixels = processor.pixels([Image.new("L", (5, 9), 255), Image.new("RGB", (8, 8))], "backbone")
    assert pixels.shape == (2, 1, 8, 8)
    assert pixels.dtype == np.float32
    assert (pixels[0] == 1).all() and (pixels[1] == -1).all()


@pytest.mark.parametrize(
    ("config", "channels", "size"),
    [
        (SimpleNamespace(), 3, (224, 224)),
        (SimpleNamespace(num_channels=3, image_size=(8, 16)), 3, (8, 16)),
        (SimpleNamespace(num_channels=1), 1, (224, 224)),
    ],
)
def test_the_config_says_channels_and_size(
    tmp_path: Path, config: Any, channels: int, size: tuple[int, int]
) -> None:
    processor = load_image(tmp_path, config)
    assert (processor.channels, processor.size) == (channels, size)
    assert processor.pixels([Image.new("L", (4, 4))], "backbone").shape[1:] == (channels, *size)


@pytest.mark.parametrize("shipped", [False, True])
def test_per_image_normalisation_removes_brightness_and_contrast(
    tmp_path: Path, shipped: bool
) -> None:
    if shipped:
        size = {"height": 8, "width": 8}
        save_pipeline(tmp_path, size=size, image_mean=[0.9], image_std=[0.1], do_rescale=False)
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    images = [Image.fromarray(ramp * 3), Image.fromarray(ramp * 3 + 60)]
    pixels = load_image(tmp_path).pixels(images, "per-image")
    scaled = ramp.astype(np.float64) * 3 / 255
    expected = (scaled - scaled.mean()) / (scaled.std() + 0.05)
    np.testing.assert_allclose(pixels[0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(pixels[0], pixels[1], atol=1e-5)


def test_a_shipped_pipeline_decides_size_and_constants(tmp_path: Path) -> None:
    size = {"height": 4, "width": 6}
    save_pipeline(tmp_path, size=size, image_mean=[0.25], image_std=[0.5], do_convert_rgb=True)
    processor = load_image(tmp_path)
    assert processor.size == (4, 6)
    pixels = processor.pixels([Image.new("RGB", (9, 9), (255, 255, 255))], "backbone")
    np.testing.assert_allclose(pixels, np.full((1, 1, 4, 6), 1.5), atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"size": {"shortest_edge": 8}, "image_mean": [0.5], "image_std": [0.5]},
        {"image_processor_type": "NoSuchProcessor"},
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    save_pipeline(tmp_path, **config)
    with pytest.raises(BackboneError, match="cannot be used") as caught:
        load_image(tmp_path)
    assert "1 channel" in caught.value.hint


def test_other_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="takes 4 channels"):
        load_image(tmp_path, SimpleNamespace(num_channels=4))


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 0x7FFF], [0x8000, 0xFFFF]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    image = open_image({"bytes": buffer.getvalue(), "path": None})
    assert np.asarray(to_channels(image, 1)).tolist() == [[0, 127], [128, 255]]
    with pytest.raises(DataError, match="float pixels"):
        to_channels(Image.new("F", (2, 2)), 1)
    with pytest.raises(DataError, match="32-bit"):
        to_channels(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), 1)


def test_images_are_turned_upright() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("L", (6, 4)).save(buffer, format="JPEG", exif=exif)
    assert open_image({"bytes": buffer.getvalue(), "path": None}).size == (4, 6)


def test_what_is_not_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        open_image({"bytes": None, "path": str(tmp_path / "a.png")})
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    with pytest.raises(DataError, match="does not decode") as caught:
        open_image({"bytes": script, "path": None})
    assert "PNG" in caught.value.hint
