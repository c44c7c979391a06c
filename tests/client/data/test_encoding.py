"""Rows are tokenised or decoded once; what is kept of that is found again, or made again."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fedgraft.client.data import cache as store_module
from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.cache import Keeper, Store
from fedgraft.client.data.rows import encode, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.modalities import image
from fedgraft.common.modalities.image import ImageProcessor
from fedgraft.common.modalities.text import TextProcessor


def make_job(task: str = "text", labels: tuple[str, ...] = ("no", "yes"), **section: Any) -> Job:
    raw = {
        "job": {"name": "test", "task": f"{task}-classification", "labels": list(labels)},
        "backbone": {"source": "path:/nowhere"},
        "method": {"kind": "head"},
        "data": section,
    }
    return parse_job(raw, where="test")


def picture(path: Path, value: int = 100, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value if mode == "L" else (value, 0, 0)).save(path)
    return path


class CountingTokenizer:
    """One id per character; counts the texts it has seen."""

    padding_side = "right"

    def __init__(self, *, types: bool = False) -> None:
        self.seen = 0
        self.types = types

    def get_vocab(self) -> dict[str, int]:
        return {"characters": 0}

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        self.seen += len(texts)
        ids = [[ord(letter) for letter in text][: options["max_length"]] for text in texts]
        encoded = {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}
        return encoded | ({"token_type_ids": [[1] * len(one) for one in ids]} if self.types else {})


def text_rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts), "label": [0] * len(texts)})


def store_in(folder: Path, *, disk: int = 10**9) -> Store:
    return Store(folder, memory=10**9, disk=disk)


def test_batches_are_padded_to_their_longest() -> None:
    processor = TextProcessor(CountingTokenizer(), pad_id=9, pad_left=False, limit=None)
    rows = text_rows("abc", "d", "efghijkl", "mn")
    examples = encode(rows, processor, make_job(max_length=5), store=None, key="")
    batch = as_tensors(examples.batch(np.array([1, 3])))
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["input_ids"].tolist() == [[ord("d"), 9], [ord("m"), ord("n")]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["input_ids"].dtype == torch.int64
    assert as_tensors(examples.batch(np.array([2])))["input_ids"].tolist() == [
        [ord(c) for c in "efghi"]
    ]
    part = examples.subset(np.array([3, 0]))
    assert as_tensors(part.batch(np.array([1])))["input_ids"].tolist() == [[ord(c) for c in "abc"]]
    assert part.labels.dtype == np.int64


def test_token_types_and_left_padding() -> None:
    processor = TextProcessor(CountingTokenizer(types=True), pad_id=9, pad_left=True, limit=None)
    examples = encode(text_rows("abc", "d"), processor, make_job(), store=None, key="")
    batch = as_tensors(examples.batch(np.array([0, 1])))
    assert batch["input_ids"][1].tolist() == [9, 9, ord("d")]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [0, 0, 1]]
    empty = encode(text_rows(), processor, make_job(), store=None, key="")
    assert len(empty) == 0


def test_tokens_come_from_the_cache_the_second_time(tmp_path: Path) -> None:
    long = "abc" * 7000  # a file of its own only for what is worth it
    job, rows = make_job(max_length=8000), text_rows(long, "d", long)
    first = TextProcessor(CountingTokenizer(types=True), pad_id=9, pad_left=False, limit=None)
    once = encode(rows, first, job, store=store_in(tmp_path / "new"), key="k")
    again = TextProcessor(CountingTokenizer(types=True), pad_id=9, pad_left=False, limit=None)
    twice = encode(rows, again, job, store=store_in(tmp_path / "new"), key="k")
    assert (first.tokenizer.seen > 0, again.tokenizer.seen) == (True, 0)
    every = np.arange(3)
    read, made = as_tensors(twice.batch(every)), as_tensors(once.batch(every))
    assert sorted(read) == ["attention_mask", "input_ids", "token_type_ids"]
    assert all(read[name].equal(made[name]) for name in made)
    assert twice.digest == once.digest
    new = store_in(tmp_path / "new")
    for other, key in ((text_rows(long, "e", long), "k"), (rows, "l")):
        encode(other, again, job, store=new, key=key)
    encode(rows, again, make_job(max_length=7999), store=new, key="k")
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_few_tokens_are_not_worth_a_file(tmp_path: Path) -> None:
    processor = TextProcessor(CountingTokenizer(), pad_id=9, pad_left=False, limit=None)
    encode(text_rows("abc"), processor, make_job(), store=store_in(tmp_path / "new"), key="k")
    assert not (tmp_path / "new").exists()


def test_a_file_of_tokens_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    job, rows = make_job(max_length=8000), text_rows("abc" * 7000, "d" * 8000, "efg" * 7000)
    processor = TextProcessor(CountingTokenizer(), pad_id=9, pad_left=False, limit=None)
    once = encode(rows, processor, job, store=store_in(tmp_path), key="k")
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9])
    again = encode(rows, processor, job, store=store_in(tmp_path), key="k")
    assert again.digest == once.digest
    assert kept.read_bytes() == whole


def test_a_text_without_tokens_or_a_length_beyond_the_backbone_is_refused() -> None:
    processor = TextProcessor(CountingTokenizer(), pad_id=9, pad_left=False, limit=64)
    with pytest.raises(BackboneError, match="reads 64 tokens") as caught:
        encode(text_rows("a"), processor, make_job(), store=None, key="")
    assert "max_length=64" in caught.value.hint
    with pytest.raises(DataError, match="text 2 of 2"):
        encode(text_rows("a", ""), processor, make_job(max_length=64), store=None, key="")


def test_mapped_pixels_are_the_pixels_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(40):
        picture(tmp_path / "images" / "no" / f"{at:02d}.png", at)
    job = make_job("image", normalize="per-image")
    rows = read_split(str(tmp_path / "images"), job).dataset
    processor = ImageProcessor(None, channels=3, size=(8, 8))
    memory = encode(rows, processor, job, store=store_in(tmp_path / "cache"), key="k")
    monkeypatch.setattr(store_module, "IN_MEMORY_BYTES", 0)
    mapped = encode(rows, processor, job, store=store_in(tmp_path / "cache"), key="k")
    index = np.array([39, 0, 7])
    assert as_tensors(memory.batch(index))["pixel_values"].equal(
        as_tensors(mapped.batch(index))["pixel_values"]
    )
    assert as_tensors(mapped.batch(index))["pixel_values"].shape == (3, 3, 8, 8)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]
    monkeypatch.setattr(image, "open_image", _must_not_run)
    again = encode(rows, processor, job, store=store_in(tmp_path / "cache"), key="k").subset(index)
    assert as_tensors(again.batch(np.array([0])))["pixel_values"].equal(
        as_tensors(memory.batch(index[:1]))["pixel_values"]
    )


def _must_not_run(*args: object) -> None:
    raise AssertionError("decoded again")


def test_a_killed_run_leaves_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "images" / "no" / "a.png")
    rows = read_split(str(tmp_path / "images"), make_job("image")).dataset
    monkeypatch.setattr(store_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(image, "open_image", _must_not_run)
    processor = ImageProcessor(None, channels=1, size=(4, 4))
    with pytest.raises(AssertionError):
        encode(rows, processor, make_job("image"), store=store_in(tmp_path / "cache"), key="k")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pixels_that_the_disk_has_no_room_for_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "images" / "no" / "a.png")
    rows = read_split(str(tmp_path / "images"), make_job("image")).dataset
    processor, index = ImageProcessor(None, channels=3, size=(8, 8)), np.arange(1)
    memory = encode(rows, processor, make_job("image"), store=None, key="k")
    monkeypatch.setattr(store_module, "IN_MEMORY_BYTES", 0)
    for disk, kept in ((3 * 64 * 4 - 1, 0), (3 * 64 * 4, 1)):
        store = store_in(tmp_path / "cache", disk=disk)
        examples = encode(rows, processor, make_job("image"), store=store, key="k")
        pixels = as_tensors(examples.batch(index))["pixel_values"]
        assert pixels.equal(as_tensors(memory.batch(index))["pixel_values"])
        assert len(list((tmp_path / "cache").glob("*"))) == kept


def test_what_an_other_version_encoded_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's cache outlives its programs; another version may make other arrays of a cell."""
    store = Store(tmp_path, memory=10**6, disk=10**9)
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"x": np.ones(10**5)}

    Keeper(store, "k").tokens(("a",), make)
    Keeper(store, "k").tokens(("a",), make)
    assert len(made) == 1
    store_module._made_by.cache_clear()
    monkeypatch.setattr(store_module, "version", lambda name: "0.0.1")
    Keeper(store, "k").tokens(("a",), make)
    assert len(made) == 2
    store_module._made_by.cache_clear()
