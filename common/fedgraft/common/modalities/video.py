"""Clips to model inputs: frames at equal distances, each treated as the backbone treats an image.

PyAV reads the files (an extra: ffmpeg's libraries are large). A clip is read from memory and may
name no other file or address: formats that list others, such as playlists, are refused.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedgraft.common.encoding import Keep, NameParts, Rows, Settings
from fedgraft.common.errors import BackboneError, DataError, InputError
from fedgraft.common.examples import ImageExamples, Indices, Inputs
from fedgraft.common.modalities.base import Modality
from fedgraft.common.modalities.image import load_image

__all__ = ["Video", "VideoProcessor", "load_video", "open_clip"]

FORMATS = frozenset({"mov", "mp4", "matroska", "webm", "avi", "gif", "mpeg", "mpegts", "ogg"})
ALONE = {"protocol_whitelist": "none"}  # nothing beside the bytes that are there
SETTINGS = "preprocessor_config.json"


@dataclass(frozen=True)
class VideoProcessor:
    """From clips to pixels: ``frames`` of each, by the ``images`` processor of the backbone."""

    images: Any
    frames: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one clip: (frames, channels, height, width)."""
        return (self.frames, self.images.channels, *self.images.size)

    def pixels(self, clip: Sequence[Image.Image], normalize: Any) -> NDArray[np.float32]:
        """float32 [frames, channels, height, width] of a clip's frames."""
        found: NDArray[np.float32] = self.images.pixels(clip, normalize)
        return found

    def configure(self, config: Any) -> None:
        """Nothing of a model depends on it."""

    def blank(self, settings: Settings) -> Inputs:
        """``pixel_values`` of one black clip, float32 [1, *shape]."""
        return {"pixel_values": np.zeros((1, *self.shape), np.float32)}

    def describe(self, settings: Settings) -> str:
        """Nothing."""
        return ""

    @cached_property
    def identity(self) -> str:
        """A digest of everything that decides which pixels a clip becomes."""
        return hashlib.sha256(f"{self.images.identity}:{self.frames}".encode()).hexdigest()


class Video(Modality):
    """Clips in files: some frames of each, as images of one size."""

    name = "video"
    one_cell = one_file = "clip"
    augmented = False
    unvaried = "there is none for clips"

    def load(self, folder: Path, config: Any) -> VideoProcessor:
        """The image processor in ``folder``, and how many frames a clip has (``load_video``)."""
        return load_video(folder, config)

    def check(self, value: Any) -> None:
        """A cell decodes, and has a frame."""
        open_clip(self.require(value), 1)

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> ImageExamples:
        """``pixel_values`` [n, frames, channels, height, width], kept where they are many."""
        shape, normalize = (len(labels), *processor.shape), settings.normalize
        sources = rows.column(self.name)

        def fill(values: NDArray[Any]) -> None:
            for at, source in enumerate(sources):
                values[at] = processor.pixels(open_clip(source, processor.frames), normalize)

        def name() -> NameParts:
            return (processor.identity, normalize, rows.digest(self.name))

        every = np.arange(len(labels), dtype=np.int64)
        return ImageExamples(labels, keep.array(shape, fill, name), every)


def load_video(folder: Path, config: Any) -> VideoProcessor:
    """What prepares clips for the backbone in ``folder``.

    Raises:
        BackboneError: the configuration does not say how many frames a clip has.
    """
    frames = getattr(config, "num_frames", None)
    if not isinstance(frames, int) or frames < 1:
        raise BackboneError(
            f"the backbone in {folder} does not say how many frames it takes",
            hint="num_frames in its config.json, as VideoMAE and ViViT have it",
        )
    return VideoProcessor(load_image(folder, config), frames)


def open_clip(source: Mapping[str, Any], frames: int) -> list[Image.Image]:
    """``frames`` images of ``{"bytes", "path"}`` (bytes win), at equal distances, RGB.

    The first and the last frame are among them; of a shorter clip some come twice.

    Raises:
        DataError: the file is missing, or it is no clip of ``FORMATS`` or is cut short.
        InputError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise InputError("clips need PyAV", hint='pip install "fedgraft[video]"') from None
    data, path = source["bytes"], source["path"]
    try:
        data = Path(path).read_bytes() if data is None else bytes(data)
        count = sum(1 for _ in _decoded(av, data))
        places = np.linspace(0, count - 1, frames if count else 0)
        wanted = [int(place) for place in places.round()]
        kept: dict[int, Image.Image] = {}
        for number, frame in enumerate(_decoded(av, data)):
            if number in wanted:
                kept[number] = frame.to_image()
        found = [kept[number] for number in wanted]
    except FileNotFoundError:
        raise DataError(f"{path} is not there", hint="check the path") from None
    except Exception as error:  # ffmpeg has an exception for every errno
        name = path or "a clip"
        raise DataError(
            f"{name} does not decode ({type(error).__name__})",
            hint=f"one of {', '.join(sorted(FORMATS))}, complete",
        ) from None
    if not found:
        raise DataError(f"{path or 'a clip'} has no frames", hint="record it again, or remove it")
    return found


def _decoded(av: Any, data: bytes) -> Any:
    """All frames of the first picture stream, one at a time."""
    with av.open(io.BytesIO(data), container_options=ALONE) as container:
        if not FORMATS & set(container.format.name.split(",")):
            raise ValueError(container.format.name)
        yield from container.decode(video=0)
