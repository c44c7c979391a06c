"""Images as pixels: the backbone's image processor, and rows that are decoded once.

Every site must get the same pixels from the same image, so the processor may depend only on the
backbone's folder. Remote code never runs. Hugging Face image processors always run on PIL, because
their torchvision variants resize differently and not every site has torchvision.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL import ImageOps

from fedgraft.common.encoding import Keep, NameParts, Rows, Settings
from fedgraft.common.errors import BackboneError, DataError, first_line
from fedgraft.common.examples import ImageExamples, Indices, Inputs
from fedgraft.common.modalities.base import Modality
from fedgraft.common.modalities.lossless import (
    DEEP,
    check_alpha,
    check_colours,
    check_levels,
    check_pages,
)

__all__ = ["Image", "ImageProcessor", "load_image", "open_image", "to_channels"]

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""The formats that ``open_image`` decodes.

PIL knows more formats; one of them is EPS, which starts an interpreter.
"""
HALF = np.float32(0.5)
# PIL refuses images of twice this number of pixels; below it warns with a line of its source.
warnings.filterwarnings("ignore", category=Pil.DecompressionBombWarning)
DEFAULT_SIZE = 224  # for backbones whose config has no image_size, such as ResNet
BATCH = 32  # images decoded at once

Normalize = Literal["backbone", "per-image"]
Pixels = NDArray[np.float32]  # [images, channels, height, width]


@dataclass(frozen=True)
class ImageProcessor:
    """A converter from PIL images to pixels of ``size`` (height, width) with 1 or 3 channels.

    1 channel is grey; 3 channels are RGB. ``pipeline`` is the Hugging Face image processor that
    comes with the backbone. Without a pipeline: bilinear resize, scale to [0, 1], then (x - 0.5) /
    0.5. ``patch`` is the side in pixels of the patches that the backbone cuts an image into; 0 if
    it cuts none.
    """

    pipeline: Any | None
    channels: int
    size: tuple[int, int]
    patch: int = 0

    def pixels(self, images: Sequence[Pil.Image], normalize: Normalize) -> Pixels:
        """Return the pixels of ``images``, float32 [n, channels, height, width].

        ``"per-image"`` replaces the backbone's constants by (x - mean) / (std + 0.05), with mean
        and std over the whole image scaled to [0, 1]. This removes the brightness and the contrast
        of a camera. The 0.05 prevents an empty image from becoming amplified noise.

        Raises:
            DataError: ``to_channels`` refuses the mode of an image.
        """
        ready = [to_channels(image, self.channels) for image in images]
        per_image = normalize == "per-image"
        if self.pipeline is None:
            scaled = self._resized(ready)
            return _standardized(scaled) if per_image else (scaled - HALF) / HALF
        result = self._shipped(ready, constants=not per_image)
        return _standardized(result) if per_image else result

    @cached_property
    def identity(self) -> str:
        """Return a digest of everything that decides the pixels of an image."""
        state = self.pipeline.to_json_string() if self.pipeline is not None else "plain"
        text = f"{type(self.pipeline).__name__}:{state}:{self.channels}:{self.size}"
        return hashlib.sha256(text.encode()).hexdigest()

    def configure(self, config: Any) -> None:
        """Do nothing: no setting of a model depends on this processor."""

    def blank(self, settings: Settings) -> Inputs:
        """Return ``pixel_values`` of one black image, float32 [1, channels, height, width]."""
        return {"pixel_values": np.zeros((1, self.channels, *self.size), np.float32)}

    def describe(self, settings: Settings) -> str:
        """Return the text about the normalisation of pixels."""
        if settings.normalize == "per-image":
            how = (
                "standardised one by one: pixels scaled to 0..1, then (x - mean) / (std + 0.05) "
                "over the whole image"
            )
        else:
            how = "prepared as the backbone's own image processor does"
        return f"Images: {how}."

    def _resized(self, images: Sequence[Pil.Image]) -> Pixels:
        wide = (self.size[1], self.size[0])
        resized = [np.asarray(image.resize(wide, Pil.Resampling.BILINEAR)) for image in images]
        stacked: Pixels = np.stack(resized).astype(np.float32) / np.float32(255)
        return stacked[:, None] if self.channels == 1 else np.moveaxis(stacked, -1, 1)

    def _shipped(self, images: Sequence[Pil.Image], *, constants: bool) -> Pixels:
        options: dict[str, Any] = {}
        if self.channels == 1:
            options["do_convert_rgb"] = False
        if not constants:
            options |= {"do_normalize": False, "do_rescale": True, "rescale_factor": 1 / 255}
        output = self.pipeline(images=list(images), return_tensors="np", **options)  # type: ignore[misc]
        return np.asarray(output["pixel_values"], dtype=np.float32)


class Image(Modality):
    """Images in files, decoded to pixels of one size."""

    name = kind = "image"
    several = "images"
    one_file = "image"
    augmented = True
    threads = True  # PIL releases the interpreter's lock

    def load(self, folder: Path, config: Any) -> ImageProcessor:
        """Return the image processor in ``folder`` (``load_image``)."""
        return load_image(folder, config)

    def check(self, value: Any) -> None:
        """Check that a cell can be decoded and its mode can be used."""
        to_channels(open_image(self.require(value)), 3)

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> ImageExamples:
        """Return pixels, float32 [n, channels, height, width]; large arrays are kept in a file."""
        shape, normalize = (len(labels), processor.channels, *processor.size), settings.normalize

        def fill(pixels: Pixels) -> None:
            at = 0
            for batch in rows.batches(self.name, BATCH):
                images = [open_image(source) for source in batch]
                pixels[at : at + len(images)] = processor.pixels(images, normalize)
                at += len(images)

        def name() -> NameParts:
            return (processor.identity, normalize, rows.digest(self.name))

        every = np.arange(len(labels), dtype=np.int64)
        return ImageExamples(labels, keep.array(shape, fill, name), every)

    def samples(
        self,
        processor: Any,
        config: Any,
        settings: Settings,
        draw: np.random.Generator,
        shape: tuple[int, int],
    ) -> Inputs:
        """Return noise, float32 [examples, channels, height, width]."""
        size = (shape[0], processor.channels, *processor.size)
        return {"pixel_values": draw.normal(size=size).astype(np.float32)}


def open_image(source: Mapping[str, Any]) -> Pil.Image:
    """Return the fully decoded image of ``{"bytes", "path"}``, rotated as its EXIF tag says.

    ``bytes`` takes precedence over ``path``.

    Raises:
        DataError: the file is missing, is not an image of ``FORMATS``, is cut short, or has several
            pages.
    """
    data, path = source["bytes"], source["path"]
    file: Any = path if data is None else io.BytesIO(data)
    try:
        with Pil.open(file, formats=FORMATS) as image:
            check_pages(image)
            deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
            image.load()
            found = ImageOps.exif_transpose(image)
            found.info[DEEP] = deep
            return found
    except DataError as error:
        what = path if path and data is None else "an embedded image"
        raise DataError(f"{what} {error}", hint=error.hint) from None
    except FileNotFoundError:
        if os.path.islink(path):
            raise DataError(
                f"{path} is a link that points to nothing",
                hint="fetch what it points to (such as `git annex get` or `datalad get`)",
            ) from None
        raise DataError(f"no image {path}", hint="check the path in the data file") from None
    except Pil.DecompressionBombError:
        what = path if path and data is None else "an embedded image"
        raise DataError(
            f"{what} has more than {2 * (Pil.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels",
            hint="save it smaller, or cut it into parts: a model reads a few hundred pixels a side",
        ) from None
    # For a broken file PIL's decoders raise many errors: SyntaxError, ValueError, struct.error...
    except Exception:
        what = path if path and data is None else "an embedded image"
        raise DataError(
            f"{what} does not decode as an image",
            hint=f"mend or remove it (readable: {', '.join(FORMATS)}), "
            'or set data.on_bad_image = "skip" in the job',
        ) from None


def to_channels(image: Pil.Image, channels: int) -> Pil.Image:
    """Return the image as mode L (1 channel) or RGB (3); 16-bit grey is scaled to 8 bits.

    PIL's own conversion cuts 16-bit values at 255; an X-ray would become white.

    Raises:
        DataError: the range of the pixels is not defined: they are float or 32-bit, or 16-bit and
            nearly nothing would be left of them; or the picture is in the alpha channel alone.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DataError(
                "an image has 32-bit pixels", hint="save it with 8 or 16 bits per pixel"
            )
        check_levels(values)
        image = Pil.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("an image has float pixels", hint="save it with 8 or 16 bits per pixel")
    elif image.info.get(DEEP):
        check_colours(image)
    if image.has_transparency_data:
        check_alpha(image)
    return image.convert("L" if channels == 1 else "RGB")


def _standardized(scaled: Pixels) -> Pixels:
    mean = scaled.mean(axis=(1, 2, 3), keepdims=True)
    spread = scaled.std(axis=(1, 2, 3), keepdims=True)
    return np.asarray((scaled - mean) / (spread + np.float32(0.05)))


def load_image(folder: Path, config: Any) -> ImageProcessor:
    """Return the image processor in ``folder``; without one, images are resized and scaled.

    Raises:
        BackboneError: the backbone takes neither grey nor RGB, or its processor does not fit.
    """
    config = getattr(config, "vision_config", config)  # CLIP, which also reads texts
    channels = int(getattr(config, "num_channels", None) or 3)
    if channels not in (1, 3):
        raise BackboneError(
            f"the backbone in {folder} takes {channels} channels",
            hint="images are read as grey (1) or RGB (3)",
        )
    side = getattr(config, "patch_size", 0)
    patch = side if isinstance(side, int) else 0
    timm = getattr(config, "model_type", "") == "timm_wrapper"
    if not timm and not (folder / "preprocessor_config.json").is_file():
        return ImageProcessor(None, channels, _config_size(config), patch)
    try:
        if timm:
            pipeline = timm_pipeline(config)
            return ImageProcessor(pipeline, channels, _probe(pipeline, channels), patch)
        from transformers import AutoImageProcessor

        pipeline = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        if hasattr(config, "num_frames"):
            pipeline = _of_frames(pipeline)
        return ImageProcessor(pipeline, channels, _probe(pipeline, channels), patch)
    except Exception as error:  # image processors raise many kinds of error
        raise BackboneError(
            f"the image processor in {folder} cannot be used: {first_line(error)}",
            hint='preprocessor_config.json must give images of one "size" with '
            f"{channels} channel{'s' * (channels > 1)}; without that file: plain resize",
        ) from None


def _of_frames(pipeline: Any) -> Any:
    """Return the settings of a clip pipeline as an image pipeline: each frame is one image."""
    from transformers import CLIPImageProcessorPil

    settings = pipeline.to_dict()
    known = CLIPImageProcessorPil().to_dict()
    return CLIPImageProcessorPil(**{name: settings[name] for name in known if name in settings})


def _probe(pipeline: Any, channels: int) -> tuple[int, int]:
    """Return the (height, width) that ``pipeline`` gives to every image.

    Raises:
        ValueError: the shape depends on the image, or has other channels.
    """
    trial = ImageProcessor(pipeline, channels, (0, 0))
    mode = "L" if channels == 1 else "RGB"
    shapes = {
        trial.pixels([Pil.new(mode, side)], "backbone").shape for side in ((48, 64), (90, 30))
    }
    if len(shapes) > 1:
        raise ValueError("images of different shapes stay different")
    shape = shapes.pop()
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"it gives pixels of shape {list(shape)}")
    return shape[2], shape[3]


def _config_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or DEFAULT_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def timm_pipeline(config: Any) -> Any:
    """Return the resize, crop and normalisation of the pre-training's evaluation.

    They are in ``pretrained_cfg``. The image is resized to the model's side divided by
    ``crop_pct``; then the middle is cropped. Missing settings take timm's defaults.
    """
    from transformers import CLIPImageProcessorPil

    told = getattr(config, "pretrained_cfg", None) or {}
    side = int(told.get("input_size", (3, 224, 224))[-1])
    resample = {"nearest": 0, "bilinear": 2, "bicubic": 3}.get(str(told.get("interpolation")), 3)
    return CLIPImageProcessorPil(
        size={"shortest_edge": int(side / told.get("crop_pct", 0.875))},
        crop_size={"height": side, "width": side},
        resample=resample,
        image_mean=list(told.get("mean", (0.485, 0.456, 0.406))),
        image_std=list(told.get("std", (0.229, 0.224, 0.225))),
    )
