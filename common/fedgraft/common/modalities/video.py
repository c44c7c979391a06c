"""Clips to model inputs: frames at equal distances, each prepared as one image of the backbone.

PyAV reads the files (an optional extra, because ffmpeg's libraries are large). A clip is read from
memory and may not refer to another file or address: formats that can list other files, such as
playlists, are refused.
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
ALONE = {"protocol_whitelist": "none"}  # no access to anything but the given bytes


@dataclass(frozen=True)
class VideoProcessor:
    """A converter from clips to pixels: ``frames`` frames per clip, each through ``images``.

    ``images`` is the backbone's image processor.
    """

    images: Any
    frames: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one clip: (frames, channels, height, width)."""
        return (self.frames, self.images.channels, *self.images.size)

    def pixels(self, clip: Sequence[Image.Image], normalize: Any) -> NDArray[np.float32]:
        """Return the pixels of a clip's frames, float32 [frames, channels, height, width]."""
        found: NDArray[np.float32] = self.images.pixels(clip, normalize)
        return found

    def configure(self, config: Any) -> None:
        """Do nothing: no setting of a model depends on this processor."""

    def blank(self, settings: Settings) -> Inputs:
        """Return ``pixel_values`` of one black clip, float32 [1, *shape]."""
        return {"pixel_values": np.zeros((1, *self.shape), np.float32)}

    def describe(self, settings: Settings) -> str:
        """Return an empty text."""
        return ""

    @cached_property
    def identity(self) -> str:
        """Return a digest of everything that decides the pixels of a clip."""
        return hashlib.sha256(f"{self.images.identity}:{self.frames}".encode()).hexdigest()


class Video(Modality):
    """Clips in files: some frames of each clip, as images of one size."""

    name = "video"
    several = "clips"
    one_file = "clip"
    unvaried = "there is none for clips"

    def load(self, folder: Path, config: Any) -> VideoProcessor:
        """Return the image processor in ``folder`` with the frames per clip (``load_video``)."""
        return load_video(folder, config)

    def check(self, value: Any) -> None:
        """Check that a cell can be decoded and has a frame."""
        open_clip(self.require(value), 1)

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> ImageExamples:
        """Return ``pixel_values`` [n, frames, channels, height, width]; a large array is kept."""
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
    """Return the processor of clips for the backbone in ``folder``.

    Raises:
        BackboneError: the configuration does not give the number of frames per clip.
    """
    frames = getattr(config, "num_frames", None)
    if not isinstance(frames, int) or frames < 1:
        raise BackboneError(
            f"the backbone in {folder} does not say how many frames it takes",
            hint="num_frames in its config.json, as VideoMAE and ViViT have it",
        )
    return VideoProcessor(load_image(folder, config), frames)


def open_clip(source: Mapping[str, Any], frames: int) -> list[Image.Image]:
    """Return ``frames`` RGB images of the clip ``{"bytes", "path"}``, at equal distances.

    ``bytes`` takes precedence over ``path``. The first and the last frame are included; if the clip
    is shorter, some frames appear twice.

    Raises:
        DataError: the file is missing, is not a clip of ``FORMATS``, or is cut short.
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
    except Exception as error:  # PyAV has one exception class for each errno
        name = path or "a clip"
        raise DataError(
            f"{name} does not decode ({type(error).__name__})",
            hint=f"one of {', '.join(sorted(FORMATS))}, complete",
        ) from None
    if not found:
        raise DataError(f"{path or 'a clip'} has no frames", hint="record it again, or remove it")
    return found


def _decoded(av: Any, data: bytes) -> Any:
    """Yield all frames of the first video stream, one at a time."""
    with av.open(io.BytesIO(data), container_options=ALONE) as container:
        if not FORMATS & set(container.format.name.split(",")):
            raise ValueError(container.format.name)
        yield from container.decode(video=0)
