"""Wav files are read as scipy, numpy and transformers say, and nothing broken passes as sound."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile
from support.matrix import tries
from support.recordings import tone, write_wav

from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.modalities.audio import SHORTEST, AudioProcessor, Recording, open_recording

W2V: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4)}


def written(samples: Any, rate: int = 8000) -> dict[str, Any]:
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, samples)
    return {"bytes": buffer.getvalue(), "path": None}


def load(folder: Path, config: Any) -> AudioProcessor:
    processor = MODALITIES["audio"].load(folder, config)
    assert isinstance(processor, AudioProcessor)
    return processor


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_every_kind_of_sample_is_the_same_sound(dtype: str) -> None:
    sound = tone(440)
    scale = {"uint8": 128, "int16": 2**15, "int32": 2**31}.get(dtype, 1)
    stored = (sound * scale + 128 * (dtype == "uint8")).round(0 if scale > 1 else 9)
    found = open_recording(written(stored.astype(dtype)))
    assert found.rate == 8000 and found.samples.dtype == np.float32
    np.testing.assert_allclose(found.samples, sound, atol=1 / 128)


def test_channels_are_averaged() -> None:
    left, right = tone(440), tone(500)
    found = open_recording(written(np.stack([left, right], 1).astype(np.float32)))
    np.testing.assert_allclose(found.samples, (left + right) / 2, atol=1e-6)


def bad() -> dict[str, tuple[bytes, str]]:
    sound = written((tone(440) * 32767).astype(np.int16))["bytes"]
    return {
        "text": (b"not a wav file at all", "does not read as a wav file"),
        "nothing": (b"", "does not read as a wav file"),
        "cut": (sound[: len(sound) // 2], "does not read as a wav file"),
        "header": (sound[:30], "does not read as a wav file"),
        "empty": (written(np.zeros(0, np.int16))["bytes"], "is empty"),
        "silent": (written(np.zeros(4000, np.int16))["bytes"], "is silent"),
        "constant": (written(np.full(4000, 0.3, np.float32))["bytes"], "is silent"),
        "short": (written(tone(440, seconds=0.02).astype(np.float32))["bytes"], "shorter than 25"),
        "narrow": (written((tone(440) * 20000).astype(np.int32))["bytes"], "those are of 16 bits"),
        "loud": (written((tone(440) * 20000).astype(np.float32))["bytes"], "between -1 and 1"),
        "nan": (written(np.full(4000, np.nan, np.float32))["bytes"], "not finite"),
    }


@pytest.mark.parametrize("what", list(bad()))
def test_what_is_no_sound_is_refused(what: str, tmp_path: Path) -> None:
    data, told = bad()[what]
    with pytest.raises(DataError, match=told) as embedded:
        open_recording({"bytes": data, "path": None})
    assert embedded.value.hint and "on_bad_audio" in embedded.value.hint
    path = tmp_path / "one.wav"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"one\.wav"):
        open_recording({"bytes": None, "path": str(path)})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recording"):
        open_recording({"bytes": None, "path": str(tmp_path / "gone.wav")})


@settings(max_examples=tries(30), deadline=None)
@given(st.binary(max_size=200))
def test_noise_of_any_bytes_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError):
        open_recording({"bytes": b"RIFF\x40\x00\x00\x00WAVE" + data, "path": None})


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (44100, 16000), (16000, 8000)])
def test_a_tone_keeps_its_pitch_and_length(rate: int, to: int) -> None:
    found = Recording(tone(440, seconds=0.5, rate=rate).astype(np.float32), rate).at(to)
    assert len(found) == -(-(rate // 2) * to // rate)
    spectrum = np.abs(np.fft.rfft(found))
    assert abs(np.argmax(spectrum) * to / len(found) - 440) < 3
    wanted = tone(440, seconds=0.5, rate=to)
    np.testing.assert_allclose(found[200:-200], wanted[200:-200], atol=0.01)


def test_samples_are_as_wav2vec2_has_them(tmp_path: Path) -> None:
    processor = load(tmp_path, transformers.Wav2Vec2Config(feat_extract_norm="layer", **W2V))
    sound = tone(440, rate=16000).astype(np.float32)
    theirs = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)(
        sound, sampling_rate=16000, padding="max_length", max_length=8000, return_tensors="np"
    )
    recording = Recording(sound, 16000)
    ours = processor.features([recording], 0.5)
    assert processor.name == "input_values" and processor.masked
    np.testing.assert_array_equal(ours, theirs["input_values"])
    assert processor.filled(recording, 0.5) == int(theirs["attention_mask"].sum())
    assert processor.shape(0.5) == (8000,) and processor.fewest == 25


def test_the_receptive_field_is_wav2vec2s_window(tmp_path: Path) -> None:
    assert load(tmp_path, transformers.Wav2Vec2Config()).fewest == SHORTEST * 16000


def test_a_model_with_group_norm_is_given_no_mask(tmp_path: Path) -> None:
    assert not load(tmp_path, transformers.HubertConfig(**W2V)).masked


def whisper(**changes: Any) -> Any:
    return transformers.WhisperConfig(**{"num_mel_bins": 16, "max_source_positions": 50, **changes})


def test_spectrograms_are_as_whisper_has_them(tmp_path: Path) -> None:
    processor = load(tmp_path, whisper())
    sound = tone(440, rate=16000).astype(np.float32)
    theirs = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)(
        sound, sampling_rate=16000, return_tensors="np"
    )
    assert processor.name == "input_features" and not processor.masked
    np.testing.assert_array_equal(
        processor.features([Recording(sound, 16000)], 1.0), theirs["input_features"]
    )
    assert processor.shape(1.0) == (16, 100)
    with pytest.raises(BackboneError, match=r"seconds = 2, but the backbone reads 1 seconds"):
        processor.size(2.0)


def test_a_recording_does_not_depend_on_its_company(tmp_path: Path) -> None:
    processor = load(tmp_path, whisper())
    loud = Recording(tone(440).astype(np.float32), 8000)
    quiet = Recording((tone(300, seconds=0.1) / 50).astype(np.float32), 8000)
    together = processor.features([loud, quiet], 1.0)
    np.testing.assert_array_equal(together[1:], processor.features([quiet], 1.0))


def test_a_shipped_extractor_decides_the_rate(tmp_path: Path) -> None:
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    processor = load(tmp_path, transformers.Wav2Vec2Config(**W2V))
    assert processor.rate == 8000
    assert processor.identity != load(tmp_path.parent, transformers.Wav2Vec2Config(**W2V)).identity


def test_an_extractor_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"shape \[8, 100\]"):
        load(tmp_path, whisper())
    with pytest.raises(BackboneError, match="no feature extractor"):
        load(tmp_path / "empty", transformers.BertConfig())
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(BackboneError, match="cannot be used"):
        load(tmp_path, whisper())


def test_less_than_a_frame_is_refused(tmp_path: Path) -> None:
    processor = load(tmp_path, transformers.Wav2Vec2Config())
    with pytest.raises(BackboneError, match="less than one frame") as refused:
        processor.size(0.01)
    assert refused.value.hint == "--set data.seconds=0.025"


def test_a_written_file_is_what_is_read(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "one.wav", tone(440))
    found = open_recording({"bytes": None, "path": str(path)})
    np.testing.assert_allclose(found.samples, tone(440), atol=1e-4)
