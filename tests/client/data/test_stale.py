"""A site trains on what its files hold now, not on what they held when a process began."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.federations import digits_job, write_digits
from support.trainings import LABELS, make_job

from fedgraft.client.data import rows as rows_module
from fedgraft.client.data import splits
from fedgraft.client.data.rows import SplitRows
from fedgraft.client.participant import Participant, open_participant
from fedgraft.common.config.job import Job


def rows(count: int, label: str, word: str = "w") -> str:
    return "".join(json.dumps({"text": f"{word} {n}", "label": label}) + "\n" for n in range(count))


class Site:
    """A site whose process goes on while people change its files."""

    def __init__(self, folder: Path, job: Job, train: str = "train.jsonl") -> None:
        self.folder, self.job = folder, job
        self.write_site(train)

    def write_site(self, train: str, more: str = "") -> None:
        (self.folder / "site.toml").write_text(f'name = "a"\n[data]\ntrain = "{train}"\n{more}')

    def at(self) -> Participant:
        """As for a new message."""
        node = {"site": str(self.folder / "site.toml"), "device": "cpu"}
        return open_participant({**node, "state": str(self.folder / "state")})

    def counts(self) -> list[int]:
        """How many examples have each label, held out or not."""
        splits = self.at().splits(self.job)
        labels = np.concatenate([splits.train.labels, splits.validation.labels])
        return [int(count) for count in np.bincount(labels, minlength=10)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "train.jsonl").write_text(rows(20, "0"))
    made = Site(tmp_path, make_job("bert"))
    assert made.counts()[0] == 20
    return made


def grown(file: Path) -> None:
    file.write_text(rows(40, "3"))


def same_size(file: Path) -> None:
    """Other labels, and not one byte more."""
    file.write_text(file.read_text().replace('"label": "0"', '"label": "3"'))


def same_size_and_time(file: Path) -> None:
    before = file.stat()
    same_size(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_an_older_one(file: Path) -> None:
    other = file.with_name("other.jsonl")
    other.write_text(rows(20, "3"))
    os.utime(other, (1, 1))
    other.replace(file)


def behind_a_link(file: Path) -> None:
    other = file.with_name("other.jsonl")
    other.write_text(rows(20, "3"))
    file.unlink()
    file.symlink_to(other)


@pytest.mark.parametrize(
    "change", [grown, same_size, same_size_and_time, replaced_by_an_older_one, behind_a_link]
)
def test_a_file_that_changed_is_read_again(site: Site, change: Callable[[Path], None]) -> None:
    change(site.folder / "train.jsonl")
    assert site.counts()[0] == 0 and site.counts()[3] >= 20


def test_many_changes_at_once_are_all_seen(site: Site) -> None:
    """Quicker than a file system notes times: sizes are equal."""
    for turn in range(50):
        (site.folder / "train.jsonl").write_text(rows(20, str(turn % 10)))
        assert site.counts()[turn % 10] == 20, turn


def test_site_toml_is_read_again(site: Site) -> None:
    (site.folder / "fixed.jsonl").write_text(rows(30, "5"))
    site.write_site("fixed.jsonl")
    assert site.counts() == [0, 0, 0, 0, 0, 30, 0, 0, 0, 0]
    site.write_site("fixed.jsonl", '[data.labels]\n"5" = "6"\n')
    assert site.counts() == [0, 0, 0, 0, 0, 0, 30, 0, 0, 0]


def test_a_pattern_meets_new_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(20, "0"))
    site = Site(tmp_path, make_job("bert"), "*.jsonl")
    assert sum(site.counts()) == 20
    (tmp_path / "b.jsonl").write_text(rows(5, "1", "other"))
    assert site.counts()[:2] == [20, 5]
    (tmp_path / "a.jsonl").unlink()
    assert site.counts()[:2] == [0, 5]


def test_a_file_for_validation_or_test_is_read_again(site: Site) -> None:
    for key in ("validation", "test"):
        (site.folder / "more.jsonl").write_text(rows(5, "1"))
        site.write_site("train.jsonl", f'{key} = "more.jsonl"\n')
        assert len(getattr(site.at().splits(site.job), key)) == 5
        (site.folder / "more.jsonl").write_text(rows(7, "2"))
        assert getattr(site.at().splits(site.job), key).labels.tolist() == [2] * 7


@pytest.fixture
def pictures(tmp_path: Path) -> Site:
    write_digits(tmp_path, 12, 3)
    return Site(tmp_path, digits_job("data.validation=0"), "train")


def pixels(site: Site) -> Any:
    return np.sort(site.at().splits(site.job).train.batch(np.arange(12))["pixel_values"], axis=0)


def test_a_folder_of_images_is_read_again(pictures: Site) -> None:
    before = pixels(pictures)
    one, other, *_ = sorted(pictures.folder.glob("train/*/*.png"))
    shutil.copyfile(other, one)
    assert not np.array_equal(pixels(pictures), before)
    shutil.copyfile(other, one.with_name("new.png"))
    assert len(pictures.at().splits(pictures.job).train) == 13
    one.unlink()
    other.rename(other.with_name("renamed.png"))
    assert len(pictures.at().splits(pictures.job).train) == 12


def test_an_image_that_a_table_names_is_read_again(pictures: Site) -> None:
    files = sorted(pictures.folder.glob("train/*/*.png"))
    lines = ["image,label", *(f"{file},{file.parent.name}" for file in files)]
    (pictures.folder / "table.csv").write_text("\n".join(lines) + "\n")
    pictures.write_site("table.csv")
    before = pixels(pictures)
    shutil.copyfile(files[1], files[0])
    assert not np.array_equal(pixels(pictures), before)


def test_an_image_that_changes_while_a_table_is_read_is_read_again(
    pictures: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was torn is left out, and mended before the last row is checked."""
    pictures.job = digits_job("data.validation=0", "data.on_bad_image='skip'")
    files = sorted(pictures.folder.glob("train/*/*.png"))
    good = files[0].read_bytes()
    files[0].write_bytes(b"torn")
    lines = ["image,label", *(f"{file},{file.parent.name}" for file in files)]
    (pictures.folder / "table.csv").write_text("\n".join(lines) + "\n")
    pictures.write_site("table.csv")
    read = rows_module.read_split

    def slow(*arguments: Any, **more: Any) -> SplitRows:
        found = read(*arguments, **more)
        files[0].write_bytes(good)
        return found

    with monkeypatch.context() as during:
        during.setattr(splits, "read_split", slow)
        assert len(pictures.at().splits(pictures.job).train) == 11
    assert len(pictures.at().splits(pictures.job).train) == 12


def test_a_teacher_that_was_replaced_teaches(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(20, "0"))
    place = Site(tmp_path, make_job("bert", training={"distillation": {}}))
    text = (tmp_path / "site.toml").read_text()
    (tmp_path / "site.toml").write_text(f'teacher = "path:{tmp_path / "teacher"}"\n{text}')

    def teach(seed: int) -> Any:
        source = make_job("bert").backbone.source.removeprefix("path:")
        shutil.copytree(source, tmp_path / "teacher", dirs_exist_ok=True)
        config = transformers.AutoConfig.from_pretrained(source)
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {label: index for index, label in enumerate(LABELS)}
        torch.manual_seed(seed)
        made = transformers.AutoModelForSequenceClassification.from_config(config)
        made.save_pretrained(tmp_path / "teacher")
        return place.at().splits(place.job).train.teacher_logits

    first = teach(1)
    assert not np.array_equal(teach(2), first)
    np.testing.assert_array_equal(teach(1), first)


def test_nothing_is_read_again_without_need(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedgraft.client.data.splits.read_split", None)
    rounds = site.job.rounds.model_copy(update={"count": 99})
    named = site.job.job.model_copy(update={"name": "another"})
    site.job = site.job.model_copy(update={"rounds": rounds, "job": named})
    assert site.counts()[0] == 20
