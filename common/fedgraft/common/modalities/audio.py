"""Recordings to model inputs: wav files, one sampling rate, and a backbone's feature extractor.

scipy reads the files and changes their rate: it is there already, and all that wav needs. Every
recording is cut or padded to one length. A model whose feature extractor asks for it is given the
attention mask; of others (wav2vec 2.0 with group norm, Whisper) the padding is part of the input,
and one length for all makes it the same at every site and in every batch.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Keep, NameParts, Rows, Settings
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import AudioExamples, Indices, Inputs
from fedgraft.common.modalities.base import Modality

__all__ = ["SHORTEST", "Audio", "AudioProcessor", "Recording", "load_audio", "open_recording"]

SHORTEST = 0.025  # seconds: one analysis window of wav2vec 2.0, HuBERT and Whisper
HOP, RATE = 160, 16_000  # of Whisper's spectrogram: samples from frame to frame, samples a second

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """One channel, float32 [samples] in [-1, 1], of ``rate`` samples a second."""

    samples: Samples
    rate: int

    def at(self, rate: int) -> Samples:
        """Resampled to ``rate`` by a polyphase filter: ceil(samples * rate / self.rate) samples."""
        if rate == self.rate:
            return self.samples
        from scipy.signal import resample_poly  # a third of a second to import

        common = math.gcd(rate, self.rate)
        found: Samples = resample_poly(self.samples, rate // common, self.rate // common)
        return found.astype(np.float32)


@dataclass(frozen=True)
class AudioProcessor:
    """From recordings to arrays of one shape.

    ``extractor`` is a Hugging Face feature extractor. ``frames`` says that it leaves samples as
    they are, and the model makes frames of them, of at least ``fewest`` samples.
    """

    extractor: Any
    frames: bool
    fewest: int

    @property
    def name(self) -> str:
        """What the model calls its input."""
        return str(self.extractor.model_input_names[0])

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.extractor.sampling_rate)

    @property
    def masked(self) -> bool:
        """Whether the model is told by an attention mask which samples are padding."""
        return self.frames and bool(self.extractor.return_attention_mask)

    def configure(self, config: Any) -> None:
        """Nothing of a model depends on it."""

    def blank(self, settings: Settings) -> Inputs:
        """One silent recording, float32 [1, ...], by the model's name for it."""
        return {self.name: np.zeros((1, *self.shape(settings.seconds)), np.float32)}

    def describe(self, settings: Settings) -> str:
        """Nothing."""
        return ""

    def size(self, seconds: float) -> int:
        """Samples in ``seconds``.

        Raises:
            BackboneError: the backbone reads no recordings of that length.
        """
        size, most = round(seconds * self.rate), getattr(self.extractor, "n_samples", None)
        if most is not None and size > most:
            raise BackboneError(
                f"data.seconds = {seconds:g}, but the backbone reads {most / self.rate:g} seconds",
                hint=f"--set data.seconds={most / self.rate:g}",
            )
        if size < self.fewest:
            raise BackboneError(
                f"data.seconds = {seconds:g} is less than one frame of the backbone",
                hint=f"--set data.seconds={math.ceil(1000 * self.fewest / self.rate) / 1000:g}",
            )
        return size

    def shape(self, seconds: float) -> tuple[int, ...]:
        """The shape of what ``features`` gives for one recording."""
        silence = Recording(np.zeros(self.rate, np.float32), self.rate)
        return self.features([silence], seconds).shape[1:]

    def features(self, recordings: Sequence[Recording], seconds: float) -> NDArray[np.float32]:
        """What the model reads of the first ``seconds`` of each, float32 [n, *shape].

        Each by itself: what a recording becomes does not depend on its company.
        """
        size = self.size(seconds)
        options: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "np"}
        if self.frames:
            options |= {"padding": "max_length", "max_length": size, "truncation": True}
        made = [self.extractor([one.at(self.rate)[:size]], **options) for one in recordings]
        return np.concatenate([np.asarray(one[self.name], np.float32) for one in made])

    def filled(self, recording: Recording, seconds: float) -> int:
        """How many of the samples are the recording's and no padding."""
        length = -(-len(recording.samples) * self.rate // recording.rate)
        return min(length, self.size(seconds))

    @cached_property
    def identity(self) -> str:
        """A digest of everything that decides what a recording becomes."""
        text = f"{type(self.extractor).__name__}:{self.extractor.to_json_string()}:{self.frames}"
        return hashlib.sha256(text.encode()).hexdigest()


class Audio(Modality):
    """Recordings in wav files, padded to one length, as images are to one size.

    Large arrays are kept. A recording can be heard again from its samples: what is kept belongs to
    the site.
    """

    name = "audio"
    one_cell = "recording"
    one_file = "wav file"

    def load(self, folder: Path, config: Any) -> AudioProcessor:
        """The feature extractor in ``folder`` (``load_audio``)."""
        return load_audio(folder, config)

    def check(self, value: Any) -> None:
        """A cell reads as a wav file with sound in it."""
        open_recording(self.require(value))

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> AudioExamples:
        """What the backbone reads of the first ``data.seconds`` of each recording."""
        seconds = settings.seconds
        shape = (len(labels), *processor.shape(seconds))
        sources = rows.column(self.name)

        def fill(values: NDArray[Any]) -> None:
            for at, source in enumerate(sources):
                values[at] = processor.features([open_recording(source)], seconds)[0]

        def name() -> NameParts:
            return (processor.identity, str(seconds), rows.digest(self.name))

        filled = None
        if processor.masked:
            found = [processor.filled(open_recording(source), seconds) for source in sources]
            filled = np.array(found, np.int64)
        values = keep.array(shape, fill, name)
        every = np.arange(len(labels), dtype=np.int64)
        return AudioExamples(labels, values, every, name=processor.name, filled=filled)


def open_recording(source: Mapping[str, Any]) -> Recording:
    """Read the wav file ``{"bytes", "path"}`` (bytes win), its channels averaged.

    Raises:
        DataError: the file is missing, no wav that can be read, cut short, empty, shorter than
            ``SHORTEST``, silent, or it has samples that are no numbers.
    """
    from scipy.io import wavfile

    data, path = source["bytes"], source["path"]
    what = str(path) if path and data is None else "an embedded recording"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # chunks of notes and pictures beside the samples
            warnings.filterwarnings("error", message="Reached EOF")
            rate, read = wavfile.read(io.BytesIO(Path(path).read_bytes() if data is None else data))
    except FileNotFoundError:
        raise DataError(f"no recording {path}", hint="check the path in the data file") from None
    except Exception:  # scipy stumbles over broken headers with struct.error, KeyError and more
        raise DataError(
            f"{what} does not read as a wav file",
            hint="save it as uncompressed wav (PCM or float), mend or remove it, "
            'or set data.on_bad_audio = "skip" in the job',
        ) from None
    if problem := _problem(read, rate):
        raise DataError(
            f"{what} {problem}", hint='remove it, or set data.on_bad_audio = "skip" in the job'
        )
    return Recording(_scaled(read), int(rate))


def _problem(read: NDArray[Any], rate: int) -> str | None:
    if rate <= 0 or not read.size:
        return "is empty"
    if len(read) < SHORTEST * rate:
        return f"is shorter than {1000 * SHORTEST:g} ms"
    if not np.isfinite(read).all():
        return "has samples that are not finite"
    return "is silent" if (_scaled(read).std() == 0) else None


def _scaled(read: NDArray[Any]) -> Samples:
    """One channel in [-1, 1]: of integers by their range; 8 bits are unsigned, 128 is zero."""
    if read.dtype.kind == "u":
        scaled = (read.astype(np.float64) - 128) / 128
    elif read.dtype.kind == "i":
        scaled = read / -float(np.iinfo(read.dtype).min)
    else:
        scaled = read.astype(np.float64)
    return (scaled if scaled.ndim == 1 else scaled.mean(axis=1)).astype(np.float32)


def load_audio(folder: Path, config: Any) -> AudioProcessor:
    """Load the feature extractor in ``folder``, or what the architecture's papers use without one.

    That is 16 kHz with zero mean and unit variance for models that read samples (Baevski et al.
    2020, "wav2vec 2.0"), with a mask where their features have layer norm; and the log-mel
    spectrogram of Radford et al. 2022 ("Whisper").

    Raises:
        BackboneError: there is none, or it does not fit.
    """
    try:
        extractor = _shipped(folder) or _usual(config)
    except Exception as error:  # whatever the feature extractor of some model raises
        raise _unusable(folder, type(error).__name__) from None
    if extractor is None:
        raise BackboneError(
            f"{folder} has no feature extractor",
            hint="put its preprocessor_config.json beside its config.json",
        )
    frames = hasattr(config, "conv_kernel")
    processor = AudioProcessor(extractor, frames, _receptive_field(config) if frames else 1)
    _check_fit(processor, folder, config)
    return processor


def _shipped(folder: Path) -> Any:
    if not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def _usual(config: Any) -> Any:
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    if hasattr(config, "conv_kernel"):
        layered = getattr(config, "feat_extract_norm", "group") == "layer"
        return Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=layered)
    if config.model_type == "whisper":
        seconds = 2 * config.max_source_positions * HOP // RATE
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    return None


def _check_fit(processor: AudioProcessor, folder: Path, config: Any) -> None:
    """Two recordings of different lengths must come out alike, and as Whisper must have them."""
    draw = np.random.default_rng(0)
    try:
        noise = [draw.normal(0, 0.1, processor.rate // part).astype(np.float32) for part in (2, 5)]
        recordings = [Recording(samples, processor.rate) for samples in noise]
        shape = processor.features(recordings, 0.5).shape
    except Exception as error:
        raise _unusable(folder, type(error).__name__) from None
    if config.model_type == "whisper" and shape[1:] != (
        config.num_mel_bins,
        2 * config.max_source_positions,
    ):
        raise _unusable(folder, f"features of shape {list(shape[1:])}")


def _unusable(folder: Path, reason: str) -> BackboneError:
    return BackboneError(
        f"the feature extractor in {folder} cannot be used: {reason}",
        hint="preprocessor_config.json must belong to config.json: copy the folder again",
    )


def _receptive_field(config: Any) -> int:
    """Samples that one frame of the convolutions sees."""
    seen = 1
    pairs = list(zip(config.conv_kernel, config.conv_stride, strict=True))
    for kernel, stride in reversed(pairs):
        seen = (seen - 1) * stride + kernel
    return int(seen)
