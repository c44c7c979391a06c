"""Images as pixels: the image processor that belongs to a backbone, and rows decoded once.

Every site must see the same picture in the same way, so what a processor does may depend only on
the backbone's folder: remote code is never run, and Hugging Face image processors always run on
PIL, because their torchvision variants resize differently and not every site has torchvision.
"""

import hashlib
import io
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
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import ImageExamples, Indices, Inputs
from fedgraft.common.modalities.base import Modality

__all__ = ["Image", "ImageProcessor", "load_image", "open_image", "to_channels"]

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""What ``open_image`` decodes; PIL knows more, among them EPS, which starts an interpreter."""
HALF = np.float32(0.5)
DEFAULT_SIZE = 224  # of backbones whose config has no image_size, such as ResNet
BATCH = 32  # images decoded at once

Normalize = Literal["backbone", "per-image"]
Pixels = NDArray[np.float32]  # [images, channels, height, width]


@dataclass(frozen=True)
class ImageProcessor:
    """From PIL images to pixels of ``size`` (height, width) with 1 (grey) or 3 (RGB) channels.

    ``pipeline`` is the Hugging Face image processor that the backbone ships. Without one: bilinear
    resize, scale to [0, 1], then (x - 0.5) / 0.5. ``patch`` is the side, in pixels, of the patches
    that the backbone cuts an image into; 0 where it does not.
    """

    pipeline: Any | None
    channels: int
    size: tuple[int, int]
    patch: int = 0

    def pixels(self, images: Sequence[Pil.Image], normalize: Normalize) -> Pixels:
        """Return float32 [n, channels, height, width].

        ``"per-image"`` puts (x - mean) / (std + 0.05), each over the whole image scaled to [0, 1],
        in the place of the backbone's constants: it takes out a camera's brightness and contrast.
        The 0.05 keeps an empty image from becoming amplified noise.

        Raises:
            DataError: an image of a mode that ``to_channels`` refuses.
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
        """A digest of everything that decides which pixels an image becomes."""
        state = self.pipeline.to_json_string() if self.pipeline is not None else "plain"
        text = f"{type(self.pipeline).__name__}:{state}:{self.channels}:{self.size}"
        return hashlib.sha256(text.encode()).hexdigest()

    def configure(self, config: Any) -> None:
        """Nothing of a model depends on it."""

    def blank(self, settings: Settings) -> Inputs:
        """``pixel_values`` of one black image, float32 [1, channels, height, width]."""
        return {"pixel_values": np.zeros((1, self.channels, *self.size), np.float32)}

    def describe(self, settings: Settings) -> str:
        """How pixels are normalised."""
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
    one_cell = one_file = "image"
    threads = True  # PIL lets go of the interpreter

    def load(self, folder: Path, config: Any) -> ImageProcessor:
        """The image processor in ``folder`` (``load_image``)."""
        return load_image(folder, config)

    def check(self, value: Any) -> None:
        """A cell decodes, and its mode can be used."""
        to_channels(open_image(self.require(value)), 3)

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> ImageExamples:
        """Pixels float32 [n, channels, height, width], kept where they are many."""
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
        """Noise, float32 [examples, channels, height, width]."""
        size = (shape[0], processor.channels, *processor.size)
        return {"pixel_values": draw.normal(size=size).astype(np.float32)}


def open_image(source: Mapping[str, Any]) -> Pil.Image:
    """Decode ``{"bytes", "path"}`` (bytes win) completely, turned upright as its EXIF tag says.

    Raises:
        DataError: the file is missing, or it is not an image of ``FORMATS`` or is cut short.
    """
    data, path = source["bytes"], source["path"]
    file: Any = path if data is None else io.BytesIO(data)
    try:
        with Pil.open(file, formats=FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"no image {path}", hint="check the path in the data file") from None
    # PIL's decoders raise whatever a broken file makes them stumble over: SyntaxError, ValueError,
    # struct.error, DecompressionBombError and more.
    except Exception:
        what = path if path and data is None else "an embedded image"
        raise DataError(
            f"{what} does not decode as an image",
            hint=f"mend or remove it (readable: {', '.join(FORMATS)}), "
            'or set data.on_bad_image = "skip" in the job',
        ) from None


def to_channels(image: Pil.Image, channels: int) -> Pil.Image:
    """Return the image as mode L (1 channel) or RGB (3); 16-bit grey is scaled to 8 bits.

    PIL's own conversion cuts 16-bit values at 255, which would turn an X-ray white.

    Raises:
        DataError: float or 32-bit pixels, whose range nobody has agreed on.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DataError(
                "an image has 32-bit pixels", hint="save it with 8 or 16 bits per pixel"
            )
        image = Pil.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("an image has float pixels", hint="save it with 8 or 16 bits per pixel")
    return image.convert("L" if channels == 1 else "RGB")


def _standardized(scaled: Pixels) -> Pixels:
    mean = scaled.mean(axis=(1, 2, 3), keepdims=True)
    spread = scaled.std(axis=(1, 2, 3), keepdims=True)
    return np.asarray((scaled - mean) / (spread + np.float32(0.05)))


def load_image(folder: Path, config: Any) -> ImageProcessor:
    """Load the image processor in ``folder``; without one, images are resized and scaled.

    Raises:
        BackboneError: the backbone wants neither grey nor RGB, or its processor does not fit.
    """
    config = getattr(config, "vision_config", config)  # of CLIP, which reads texts as well
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
    except Exception as error:  # whatever the image processor of some model raises
        raise BackboneError(
            f"the image processor in {folder} cannot be used: {_first_line(error)}",
            hint='preprocessor_config.json must give images of one "size" with '
            f"{channels} channel{'s' * (channels > 1)}; without that file: plain resize",
        ) from None


def _of_frames(pipeline: Any) -> Any:
    """The settings of a pipeline for clips, applied to frames as if they were images."""
    from transformers import CLIPImageProcessorPil

    settings = pipeline.to_dict()
    known = CLIPImageProcessorPil().to_dict()
    return CLIPImageProcessorPil(**{name: settings[name] for name in known if name in settings})


def _probe(pipeline: Any, channels: int) -> tuple[int, int]:
    """The (height, width) that ``pipeline`` makes of any image; ValueError if it depends on it."""
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
    """Resize, crop and normalise as the pre-training's evaluation did (``pretrained_cfg``).

    The resized side is the model's divided by ``crop_pct``; then the middle is cropped, with
    timm's defaults for what is not said.
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
