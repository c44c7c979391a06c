"""Recordings to model inputs: wav files, one sampling rate, and a backbone's feature extractor.

scipy reads the files and changes their sampling rate: it is already installed, and wav files need
nothing more. Every recording is cut or padded to one length. A model gets an attention mask if its
feature extractor asks for one. For other models (wav2vec 2.0 with group norm, Whisper) the padding
is part of the input. One length for all recordings makes this padding the same at every site and in
every batch.
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

NARROW = 1 << 15  # 16-bit samples in a file of 32 bits would be nearly silent
LOUD = 16  # a mix may go a little beyond 1; samples of a whole-number range go far beyond
SHORTEST = 0.025  # seconds: one analysis window of wav2vec 2.0, HuBERT and Whisper
HOP, RATE = 160, 16_000  # Whisper's spectrogram: samples from frame to frame, samples per second

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """One channel, float32 [samples] in [-1, 1], at ``rate`` samples per second."""

    samples: Samples
    rate: int

    def at(self, rate: int) -> Samples:
        """Return the samples at ``rate``: ceil(samples * rate / self.rate) of them.

        A polyphase filter resamples the recording.
        """
        if rate == self.rate:
            return self.samples
        from scipy.signal import resample_poly  # this import takes a third of a second

        common = math.gcd(rate, self.rate)
        found: Samples = resample_poly(self.samples, rate // common, self.rate // common)
        return found.astype(np.float32)


@dataclass(frozen=True)
class AudioProcessor:
    """A converter from recordings to arrays of one shape.

    ``extractor`` is a Hugging Face feature extractor. ``frames``: the extractor returns samples,
    and the model makes frames of them; it needs at least ``fewest`` samples.
    """

    extractor: Any
    frames: bool
    fewest: int

    @property
    def name(self) -> str:
        """Return the model's name for its input."""
        return str(self.extractor.model_input_names[0])

    @property
    def rate(self) -> int:
        """Return the sampling rate in samples per second."""
        return int(self.extractor.sampling_rate)

    @property
    def masked(self) -> bool:
        """Return whether the model gets an attention mask that marks the padding."""
        return self.frames and bool(self.extractor.return_attention_mask)

    def configure(self, config: Any) -> None:
        """Do nothing: no setting of a model depends on this processor."""

    def blank(self, settings: Settings) -> Inputs:
        """Return one silent recording, float32 [1, ...], and its mask if the model gets one."""
        found: Inputs = {self.name: np.zeros((1, *self.shape(settings.seconds)), np.float32)}
        samples = found[self.name].shape[:2]
        return found | ({"attention_mask": np.ones(samples, np.int64)} if self.masked else {})

    def describe(self, settings: Settings) -> str:
        """Return an empty text."""
        return ""

    def size(self, seconds: float) -> int:
        """Return the number of samples in ``seconds``.

        Raises:
            BackboneError: the backbone does not accept recordings of that length.
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
        """Return the shape of the output of ``features`` for one recording."""
        silence = Recording(np.zeros(self.rate, np.float32), self.rate)
        return self.features([silence], seconds).shape[1:]

    def features(self, recordings: Sequence[Recording], seconds: float) -> NDArray[np.float32]:
        """Return the model's input for the first ``seconds`` of each, float32 [n, *shape].

        Each recording is converted alone, so its result does not depend on the other recordings.
        """
        size = self.size(seconds)
        options: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "np"}
        if self.frames:
            options |= {"padding": "max_length", "max_length": size, "truncation": True}
        made = [self.extractor([one.at(self.rate)[:size]], **options) for one in recordings]
        return np.concatenate([np.asarray(one[self.name], np.float32) for one in made])

    def filled(self, recording: Recording, seconds: float) -> int:
        """Return the number of samples that belong to the recording and are not padding."""
        length = -(-len(recording.samples) * self.rate // recording.rate)
        return min(length, self.size(seconds))

    @cached_property
    def identity(self) -> str:
        """Return a digest of everything that decides the result for a recording."""
        text = f"{type(self.extractor).__name__}:{self.extractor.to_json_string()}:{self.frames}"
        return hashlib.sha256(text.encode()).hexdigest()


class Audio(Modality):
    """Recordings in wav files, padded to one length, as images are resized to one size.

    Large arrays are kept in files. A recording can be played from its kept samples, so these files
    must stay at the site.
    """

    name = "audio"
    several = "recordings"
    one_file = "wav file"
    augmented = True

    def load(self, folder: Path, config: Any) -> AudioProcessor:
        """Return the feature extractor in ``folder`` (``load_audio``)."""
        return load_audio(folder, config)

    def check(self, value: Any) -> None:
        """Check that a cell is a readable wav file with sound in it."""
        open_recording(self.require(value))

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> AudioExamples:
        """Return the backbone's input for the first ``data.seconds`` of each recording."""
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
    """Return the recording in the wav file ``{"bytes", "path"}``, the mean of its channels.

    ``bytes`` takes precedence over ``path``.

    Raises:
        DataError: the file is missing, is not a readable wav file, is cut short, is empty, is
            shorter than ``SHORTEST``, is silent, or has samples that are not finite numbers.
    """
    from scipy.io import wavfile

    data, path = source["bytes"], source["path"]
    what = str(path) if path and data is None else "an embedded recording"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about chunks of notes and pictures
            warnings.filterwarnings("error", message="Reached EOF")
            rate, read = wavfile.read(io.BytesIO(Path(path).read_bytes() if data is None else data))
    except FileNotFoundError:
        raise DataError(f"no recording {path}", hint="check the path in the data file") from None
    except Exception:  # a broken header makes scipy raise struct.error, KeyError and more
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
    peak = max(float(read.max()), -float(read.min()))
    if read.dtype.kind == "i" and read.dtype.itemsize > 2 and 0 < peak <= NARROW:
        return f"has {8 * read.dtype.itemsize}-bit samples up to {peak:g}: those are of 16 bits"
    if read.dtype.kind == "f" and peak > LOUD:
        return f"has float samples up to {peak:g}, and they belong between -1 and 1"
    return "is silent" if (_scaled(read).std() == 0) else None


def _scaled(read: NDArray[Any]) -> Samples:
    """Return one channel in [-1, 1].

    Integer samples are divided by the range of their type. 8-bit samples are unsigned; 128 means
    zero.
    """
    if read.dtype.kind == "u":
        scaled = (read.astype(np.float64) - 128) / 128
    elif read.dtype.kind == "i":
        scaled = read / -float(np.iinfo(read.dtype).min)
    else:
        scaled = read.astype(np.float64)
    return (scaled if scaled.ndim == 1 else scaled.mean(axis=1)).astype(np.float32)


def load_audio(folder: Path, config: Any) -> AudioProcessor:
    """Return the feature extractor in ``folder``, or the usual one of the architecture's papers.

    For models that read samples, the usual one is 16 kHz with zero mean and unit variance (Baevski
    et al. 2020, "wav2vec 2.0"). It has an attention mask if the model's feature layers have layer
    norm. For Whisper it is the log-mel spectrogram of Radford et al. 2022 ("Whisper").

    Raises:
        BackboneError: there is no feature extractor, or it does not fit the backbone.
    """
    try:
        extractor = _shipped(folder) or _usual(config)
    except Exception as error:  # feature extractors raise many kinds of error
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
    """Check that recordings of different lengths get one shape, and that Whisper gets its own."""
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
    """Return the number of samples that one frame of the convolutions covers."""
    seen = 1
    pairs = list(zip(config.conv_kernel, config.conv_stride, strict=True))
    for kernel, stride in reversed(pairs):
        seen = (seen - 1) * stride + kernel
    return int(seen)
