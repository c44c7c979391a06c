"""Clips become frames at equal distances; what is no clip, or names other files, is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from support.clips import LABELS, write_clip, write_clips
from support.evaluations import NOWHERE
from support.families import FAMILIES, family_job

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.rows import Columns, read_split
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.errors import BackboneError, DataError, InputError
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.modalities.video import VideoProcessor, open_clip


def source(path: Path, *, inside: bool = False) -> dict[str, Any]:
    data = path.read_bytes() if inside else None
    return {"bytes": data, "path": None if inside else str(path)}


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


def place_of(image: Image.Image) -> float:
    """The column of the bright square."""
    bright = np.asarray(image.convert("L")).astype(float).sum(0)
    return float((bright * np.arange(len(bright))).sum() / bright.sum())


@pytest.mark.parametrize("inside", [False, True])
def test_frames_are_at_equal_distances(tmp_path: Path, inside: bool) -> None:
    write_clip(tmp_path / "a.mp4", right=True, seed=1)
    every = open_clip(source(tmp_path / "a.mp4", inside=inside), 9)
    some = open_clip(source(tmp_path / "a.mp4", inside=inside), 5)
    assert all(same(one, every[2 * number]) for number, one in enumerate(some))
    places = [place_of(one) for one in some]
    assert places == sorted(places) and places[-1] > places[0] + 8
    (first,) = open_clip(source(tmp_path / "a.mp4"), 1)
    assert same(first, every[0])


def test_a_short_clip_gives_some_frames_twice(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", right=True, seed=1, frames=2)
    assert len(open_clip(source(tmp_path / "a.mp4"), 5)) == 5


def test_a_gif_is_a_clip(tmp_path: Path) -> None:
    images = [Image.fromarray(np.full((8, 8), 80 * n, np.uint8)) for n in range(3)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    found = [float(np.asarray(one).mean()) for one in open_clip(source(tmp_path / "a.gif"), 3)]
    assert found == pytest.approx([0, 80, 160], abs=8)


@pytest.mark.parametrize("what", ["missing", "text", "cut", "playlist", "sound"])
def test_what_is_no_clip_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.mp4"
    if what == "text":
        path.write_text("no clip")
    elif what == "cut":
        write_clip(path, right=True, seed=1)
        path.write_bytes(path.read_bytes()[:300])
    elif what == "playlist":  # it would have other files read, or addresses asked
        write_clip(tmp_path / "b.mp4", right=True, seed=1)
        path.write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path / 'b.mp4'}\n#EXT-X-ENDLIST\n")
    elif what == "sound":
        from support.recordings import write_tones

        write_tones(tmp_path / "tones", 1)
        path.write_bytes(next(tmp_path.glob("tones/*/*.wav")).read_bytes())
    with pytest.raises(DataError):
        open_clip(source(path), 4)


def test_without_pyav_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "a.mp4", right=True, seed=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="need PyAV") as caught:
        open_clip(source(tmp_path / "a.mp4"), 4)
    assert "fedgraft[video]" in caught.value.hint


# In a job


def test_clips_are_encoded_as_the_model_reads_them(tmp_path: Path) -> None:
    job = family_job("videomae", tmp_path)
    processor = open_workbench(job).processor
    assert isinstance(processor, VideoProcessor) and processor.shape == (4, 3, 8, 8)
    assert job.simulation is not None
    rows = read_split(str(job.simulation.test), job).dataset
    labels = np.array(rows["label"][:])
    examples = MODALITIES["video"].encode(Columns(rows), labels, processor, job.settings, NOWHERE)
    batch = as_tensors(examples.batch(np.arange(3)))["pixel_values"]
    assert batch.shape == (3, 4, 3, 8, 8)
    first = open_clip(rows.with_format("arrow")[:]["video"].to_pylist()[0], 4)
    np.testing.assert_array_equal(batch[0].numpy(), processor.pixels(first, "backbone"))


def test_a_bad_clip_is_refused_or_left_out(tmp_path: Path) -> None:
    job = family_job("videomae", tmp_path / "job")
    write_clips(tmp_path / "own", 2)
    (tmp_path / "own" / LABELS[0] / "bad.mp4").write_text("no clip")
    with pytest.raises(DataError, match="does not decode"):
        read_split(str(tmp_path / "own"), job)
    data = job.data.model_copy(update={"on_bad_video": "skip"})
    rows = read_split(str(tmp_path / "own"), job.model_copy(update={"data": data}))
    assert (len(rows.dataset), rows.skipped) == (4, 1)


def test_the_settings_of_a_pipeline_for_clips_are_used(tmp_path: Path) -> None:
    config = FAMILIES["videomae"][0]()
    config.save_pretrained(tmp_path)
    described = {
        "image_processor_type": "VideoMAEImageProcessor", "do_resize": True, "do_rescale": True,
        "size": {"shortest_edge": 12}, "do_center_crop": True,
        "crop_size": {"height": 8, "width": 8},
        "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255, "resample": 2,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    processor = MODALITIES["video"].load(tmp_path, read)
    assert isinstance(processor, VideoProcessor) and processor.shape == (4, 3, 8, 8)
    grey = Image.new("RGB", (24, 12), (128, 128, 128))
    found = processor.pixels([grey] * 4, "backbone")
    wanted = (128 / 255 - np.array([0.1, 0.2, 0.3])) / 0.5
    np.testing.assert_allclose(found[0].mean((1, 2)), wanted, atol=1e-3)


def test_a_backbone_without_frames_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig(image_size=8).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="how many frames"):
        MODALITIES["video"].load(tmp_path, transformers.AutoConfig.from_pretrained(tmp_path))
