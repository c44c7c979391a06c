"""Raw rows to model inputs: the tokenizer or the image pipeline that belongs to a backbone.

Every site must see the same picture in the same way, so what a processor does may depend only on
the backbone's folder: remote code is never run, and Hugging Face image processors always run on
PIL, because their torchvision variants resize differently and not every site has torchvision.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedgraft.common.backbones.timm import timm_pipeline
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.modalities.audio import AudioProcessor, load_audio
from fedgraft.common.modalities.video import VideoProcessor, load_video

__all__ = [
    "ImageProcessor",
    "Processor",
    "TextProcessor",
    "load_processor",
    "open_image",
    "to_channels",
]

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""What ``open_image`` decodes; PIL knows more, among them EPS, which starts an interpreter."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)
HALF = np.float32(0.5)
DEFAULT_SIZE = 224  # of backbones whose config has no image_size, such as ResNet

Normalize = Literal["backbone", "per-image"]
Pixels = NDArray[np.float32]  # [images, channels, height, width]


@dataclass(frozen=True)
class TextProcessor:
    """A tokenizer and what padding takes; ``limit`` is the longest input in tokens, or none.

    Where the tokenizer has no padding token, ``pad_id`` is its end-of-text token: a model that
    finds the last token by ``config.pad_token_id`` must be told this one. ``decoder_start`` is what
    the decoder reads first, of models that have an encoder and a decoder.
    """

    tokenizer: Any
    pad_id: int
    pad_left: bool
    limit: int | None
    decoder_start: int | None = None

    def tokenize(
        self, texts: Sequence[str], max_length: int, *, written: bool = False
    ) -> dict[str, list[list[int]]]:
        """Tokenise each text, cut to ``max_length``, unpadded; keys as the tokenizer names them.

        Some tokenizers treat what is to be ``written`` differently.
        """
        cut = {"truncation": True, "max_length": max_length}
        if written:
            encoded = self.tokenizer(text_target=list(texts), **cut)
        else:
            encoded = self.tokenizer(list(texts), **cut)
        return {name: encoded[name] for name in encoded}

    def tokenize_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as a whole, and behind them the end-of-text token, if there is."""
        found: list[list[int]] = self.tokenizer(list(texts), truncation=False, verbose=False)[
            "input_ids"
        ]
        end = self.tokenizer.eos_token_id
        return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in found]

    def tokenize_stretches(
        self, texts: Sequence[str], max_length: int
    ) -> dict[str, list[list[int]]]:
        """All of each text in stretches of ``max_length``, each with the special tokens around."""
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=max_length, return_overflowing_tokens=True
        )
        return {name: encoded[name] for name in encoded}

    @cached_property
    def identity(self) -> str:
        """A digest of everything that decides which ids a text becomes."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        state = json.loads(fast.to_str()) if fast is not None else self.tokenizer.get_vocab()
        for setting in ("truncation", "padding"):  # they change with every call
            state.pop(setting, None)
        parts = [getattr(self.tokenizer, "truncation_side", ""), state]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ImageProcessor:
    """From PIL images to pixels of ``size`` (height, width) with 1 (grey) or 3 (RGB) channels.

    ``pipeline`` is the Hugging Face image processor that the backbone ships. Without one: bilinear
    resize, scale to [0, 1], then (x - 0.5) / 0.5.
    """

    pipeline: Any | None
    channels: int
    size: tuple[int, int]

    def pixels(self, images: Sequence[Image.Image], normalize: Normalize) -> Pixels:
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

    def _resized(self, images: Sequence[Image.Image]) -> Pixels:
        wide = (self.size[1], self.size[0])
        resized = [np.asarray(image.resize(wide, Image.Resampling.BILINEAR)) for image in images]
        stacked: Pixels = np.stack(resized).astype(np.float32) / np.float32(255)
        return stacked[:, None] if self.channels == 1 else np.moveaxis(stacked, -1, 1)

    def _shipped(self, images: Sequence[Image.Image], *, constants: bool) -> Pixels:
        options: dict[str, Any] = {}
        if self.channels == 1:
            options["do_convert_rgb"] = False
        if not constants:
            options |= {"do_normalize": False, "do_rescale": True, "rescale_factor": 1 / 255}
        output = self.pipeline(images=list(images), return_tensors="np", **options)  # type: ignore[misc]
        return np.asarray(output["pixel_values"], dtype=np.float32)


Processor = TextProcessor | ImageProcessor | AudioProcessor | VideoProcessor


def load_processor(folder: Path, modality: str, config: Any) -> Processor:
    """Load what turns rows into inputs of the backbone in ``folder``, from local files alone.

    ``config`` is the backbone's transformers configuration; ``modality`` is
    ``"text"``, ``"image"``, ``"audio"`` or ``"video"``.

    Raises:
        BackboneError: no tokenizer, no way to pad, or an image processor or feature extractor that
            does not fit.
    """
    if modality == "audio":
        return load_audio(folder, config)
    if modality == "video":
        return load_video(folder, config, _load_image)
    if modality == "text":
        return _load_text(folder, config)
    return _load_image(folder, config)


def open_image(source: Mapping[str, Any]) -> Image.Image:
    """Decode ``{"bytes", "path"}`` (bytes win) completely, turned upright as its EXIF tag says.

    Raises:
        DataError: the file is missing, or it is not an image of ``FORMATS`` or is cut short.
    """
    data, path = source["bytes"], source["path"]
    file: Any = path if data is None else io.BytesIO(data)
    try:
        with Image.open(file, formats=FORMATS) as image:
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


def to_channels(image: Image.Image, channels: int) -> Image.Image:
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
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("an image has float pixels", hint="save it with 8 or 16 bits per pixel")
    return image.convert("L" if channels == 1 else "RGB")


def _standardized(scaled: Pixels) -> Pixels:
    mean = scaled.mean(axis=(1, 2, 3), keepdims=True)
    spread = scaled.std(axis=(1, 2, 3), keepdims=True)
    return np.asarray((scaled - mean) / (spread + np.float32(0.05)))


def _load_text(folder: Path, config: Any) -> TextProcessor:
    from transformers import AutoTokenizer  # seconds to import, and images never need it

    # Without this look, transformers builds a tokenizer with an empty vocabulary for some models.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BackboneError(
            f"{folder} has no tokenizer",
            hint="put tokenizer.json (and tokenizer_config.json) beside its config.json",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise BackboneError(
            f"the tokenizer in {folder} does not load: {_first_line(error)}",
            hint="a tokenizer that needs its own code cannot be used; fetch the backbone again",
        ) from None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise BackboneError(
            f"the tokenizer in {folder} has neither a padding nor an end-of-text token",
            hint="set pad_token in its tokenizer_config.json",
        )
    # transformers writes "no limit" as a huge number.
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    start = getattr(config, "decoder_start_token_id", None)
    left, limit = tokenizer.padding_side == "left", min(known, default=None)
    return TextProcessor(tokenizer, int(pad), left, limit, start)


def _load_image(folder: Path, config: Any) -> ImageProcessor:
    config = getattr(config, "vision_config", config)  # of CLIP, which reads texts as well
    channels = int(getattr(config, "num_channels", None) or 3)
    if channels not in (1, 3):
        raise BackboneError(
            f"the backbone in {folder} takes {channels} channels",
            hint="images are read as grey (1) or RGB (3)",
        )
    timm = getattr(config, "model_type", "") == "timm_wrapper"
    if not timm and not (folder / "preprocessor_config.json").is_file():
        return ImageProcessor(None, channels, _config_size(config))
    try:
        if timm:
            pipeline = timm_pipeline(config)
            return ImageProcessor(pipeline, channels, _probe(pipeline, channels))
        from transformers import AutoImageProcessor

        pipeline = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        if hasattr(config, "num_frames"):
            pipeline = _of_frames(pipeline)
        return ImageProcessor(pipeline, channels, _probe(pipeline, channels))
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
        trial.pixels([Image.new(mode, side)], "backbone").shape for side in ((48, 64), (90, 30))
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
