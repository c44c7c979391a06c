"""A site's wav files become examples: by label, refused or skipped where bad, then kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import concatenate_datasets
from support.recordings import LABELS, tone, write_tones, write_wav

from fedgraft.client.data import cache as store_module
from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.cache import Store
from fedgraft.client.data.rows import encode, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import AudioExamples, concatenate
from fedgraft.common.modalities import MODALITIES, Processor
from fedgraft.common.modalities.audio import AudioProcessor


def make_job(**section: Any) -> Job:
    raw = {
        "job": {"name": "test", "task": "audio-classification", "labels": list(LABELS)},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "head"},
        "data": {"seconds": 0.5, **section},
    }
    return parse_job(raw, where="test")


def processor_of(folder: Path, norm: str = "layer") -> Processor:
    config = transformers.Wav2Vec2Config(
        conv_dim=(8, 8), conv_kernel=(10, 4), conv_stride=(5, 4), feat_extract_norm=norm
    )
    found = MODALITIES["audio"].load(folder, config)
    assert isinstance(found, AudioProcessor)
    return found


def encoded(path: Path, job: Job, processor: Processor, store: Store | None = None) -> Any:
    rows = read_split(str(path), job).dataset
    return encode(rows, processor, job, store=store, key="k")


def test_a_folder_of_wav_files_by_label(tmp_path: Path) -> None:
    write_tones(tmp_path, 3)
    rows = read_split(str(tmp_path), make_job())
    assert rows.dataset.column_names == ["audio", "label"] and rows.skipped == 0
    paths = [Path(one["path"]) for one in rows.dataset["audio"]]
    names = [LABELS[label] for label in rows.dataset["label"]]
    assert [path.parent.name for path in paths] == names and len(names) == 6


def test_a_table_names_wav_files_beside_it(tmp_path: Path) -> None:
    write_tones(tmp_path, 2)
    table = tmp_path / "rows.csv"
    table.write_text("sound,label\nlow/00.wav,low\nhigh/01.wav,high\n")
    rows = read_split(str(table), make_job(), columns={"audio": "sound"}).dataset
    assert [Path(one["path"]).name for one in rows["audio"]] == ["00.wav", "01.wav"]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "does not read"), (b"RIFF....", "does not read"), (None, "is silent")],
)
def test_a_bad_recording_is_refused_or_skipped(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    write_tones(tmp_path, 2)
    bad = tmp_path / "low" / "zz.wav"
    write_wav(bad, np.zeros(4000))
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(DataError, match=told) as refused:
        read_split(str(tmp_path), make_job())
    assert str(bad) in str(refused.value) and refused.value.hint
    rows = read_split(str(tmp_path), make_job(on_bad_audio="skip"))
    assert rows.skipped == 1 and len(rows.dataset) == 4


def test_nothing_but_bad_recordings_is_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "low" / "00.wav", np.zeros(4000))
    with pytest.raises(DataError, match="no wav file of"):
        read_split(str(tmp_path), make_job(on_bad_audio="skip"))


def test_recordings_are_padded_to_one_length_with_a_mask(tmp_path: Path) -> None:
    long, short = tone(440, seconds=0.9), tone(440, seconds=0.2)
    write_wav(tmp_path / "low" / "00.wav", long)
    write_wav(tmp_path / "high" / "00.wav", short)
    examples = encoded(tmp_path, make_job(), processor_of(tmp_path / "none"))
    assert isinstance(examples, AudioExamples)
    batch = as_tensors(examples.batch(np.array([0, 1])))
    high, low = batch["input_values"]
    assert batch["input_values"].shape == (2, 8000)  # half a second at 16 kHz
    assert batch["attention_mask"].sum(1).tolist() == [3200, 8000]
    assert not high[3200:].any() and low[-100:].any()
    assert float(high[:3200].mean()) == pytest.approx(0, abs=1e-4)
    assert float(high[:3200].var()) == pytest.approx(1, abs=1e-3)


def test_a_subset_and_a_concatenation_keep_rows_and_mask(tmp_path: Path) -> None:
    job, processor = make_job(), processor_of(tmp_path / "none")
    whole = encoded(write_tones(tmp_path / "a", 3), job, processor)
    other = encoded(write_tones(tmp_path / "b", 2, seed=1), job, processor)
    joined = concatenate([whole.subset(np.array([5, 0])), other])
    sources = [(whole, 5), (whole, 0), *((other, row) for row in range(4))]
    assert len(joined) == 6
    for at, (part, row) in enumerate(sources):
        assert joined.labels[at] == part.labels[row]
        for key, value in as_tensors(joined.batch(np.array([at]))).items():
            assert torch.equal(value, as_tensors(part.batch(np.array([row])))[key])
    assert whole.subset(np.array([0])).digest != whole.subset(np.array([1])).digest


def test_large_arrays_are_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "IN_MEMORY_BYTES", 0)
    job, processor = make_job(), processor_of(tmp_path / "none")
    store = Store(tmp_path / "cache", memory=10**9, disk=10**9)
    sounds = write_tones(tmp_path / "a", 3)
    first = encoded(sounds, job, processor, store)
    assert isinstance(first.values, np.memmap) and first.nbytes < 1000
    monkeypatch.setattr(type(processor), "features", None)  # or it would be called
    monkeypatch.setattr(type(processor), "shape", lambda self, seconds: (8000,))
    again = encoded(sounds, job, processor, store)
    assert again.digest == first.digest


def test_the_order_of_rows_and_the_length_are_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "IN_MEMORY_BYTES", 0)
    processor = processor_of(tmp_path / "none")
    store = Store(tmp_path / "cache", memory=10**9, disk=10**9)
    rows = read_split(str(write_tones(tmp_path / "a", 2)), make_job()).dataset
    turned = concatenate_datasets([rows.select([3]), rows.select([0, 1, 2])])
    for dataset, seconds in ((rows, 0.5), (turned, 0.5), (rows, 0.25)):
        job = make_job(seconds=seconds)
        kept = encode(dataset, processor, job, store=store, key="k")
        plain = encode(dataset, processor, job, store=None, key="k")
        assert kept.digest == plain.digest
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3


def test_a_length_that_the_backbone_cannot_read(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(num_mel_bins=16, max_source_positions=50)
    processor = MODALITIES["audio"].load(tmp_path / "none", config)
    sounds = write_tones(tmp_path / "a", 1)
    with pytest.raises(BackboneError, match="reads 1 seconds"):
        encoded(sounds, make_job(seconds=5.0), processor)
