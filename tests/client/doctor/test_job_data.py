"""The doctor tries a job on the site's data as training would, validation and encoding included."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from support.language_models import save_tokenizer
from transformers import BertConfig, BertModel

from fedgraft.client.doctor.job_data import job_data
from fedgraft.client.doctor.local import OK, WARN, Patient
from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.errors import FedgraftError


class Site:
    """A site with files of texts and numbers, and a job for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tokenizer(folder / "backbone")
        config = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            vocab_size=200, max_position_embeddings=64,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder / "backbone")
        for name, letters in (("train", "abcdefgh"), ("validation", "ijk"), ("test", "lmn")):
            self.write(name, [{"text": letter, "target": 50} for letter in letters])
        data = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "a", "data": data}))

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def found(self, **data: Any) -> Any:
        raw = {
            "job": {"name": "t", "task": "text-regression"},
            "backbone": {"source": f"path:{self.folder / 'backbone'}"},
            "method": {"kind": "head"},
            "data": {"lowest": 0, "highest": 100, "max_length": 16} | data,
        }
        path = self.folder / "job.toml"
        path.write_text(dump_job(parse_job(raw, where="test")))
        return job_data(Patient(self.folder / "site.toml", str(path)))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    return Site(tmp_path)


def test_all_files_are_read_and_encoded(site: Site) -> None:
    found = site.found()
    assert found.state == OK
    assert found.what == "t: 8 rows to train on, 3 to validate on, 3 to test on"


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_row_that_training_would_refuse_is_named(site: Site, name: str) -> None:
    site.write(name, [{"text": "x", "target": 50}, {"text": "y", "target": 150}])
    with pytest.raises(FedgraftError, match=rf"{name}\.jsonl, line 2: the target is outside of 0"):
        site.found()


def test_texts_that_the_backbone_cannot_read_are_named(site: Site) -> None:
    with pytest.raises(FedgraftError, match=r"max_length = 512, but the backbone reads 64 tokens"):
        site.found(max_length=512)


def test_validation_rows_that_train_are_counted(site: Site) -> None:
    site.write("validation", [{"text": "a", "target": 50}, {"text": "i", "target": 50}])
    found = site.found()
    assert found.state == WARN
    assert "Validation rows that stand in the training rows, too: 1." in found.hint


def test_without_the_backbone_the_rows_are_read_and_it_says_so(site: Site) -> None:
    (site.folder / "backbone" / "config.json").unlink()
    found = site.found()
    assert found.state == WARN and found.what.startswith("t: 8 rows")
    assert "The rows were not encoded: " in found.hint and "no config.json" in found.hint
