"""A word that stands in every row of every site: it is in nothing that leaves, and nothing kept.

The sites' processes write down what they send before it is encrypted. One of them fails on purpose,
with an error that quotes the word, and another has a row that is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.faulty_site import SENT
from e2e.partners import NGINX, Partners
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification

from fedgraft.client.site_config import load_site
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

CANARY = "canary-4c1f9e"


def write_backbone(folder: Path) -> Path:
    """A tiny BERT that reads words, the canary among them."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    config = BertConfig(vocab_size=8, num_attention_heads=2, max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "very": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {"text": f"very {word} {CANARY} {n}", "label": word, "name": f"{CANARY} {n}"}
        for n in range(count)
        for word in ("good", "bad")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job_of(folder: Path, **privacy: Any) -> Job:
    sections: dict[str, Any] = {
        "job": {"name": "words", "task": "text-classification", "labels": ["good", "bad"]},
        "backbone": {"source": f"path:{folder / 'backbone'}"},
        "method": {"kind": "lora", "targets": ["query"], "head": "shared"},
        "rounds": {"count": 4, "min_sites": 2, "deadline": "60s"},
        "data": {"max_length": 16},
        "privacy": privacy,
        "simulation": {
            "sites": 3,
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "partition": {"kind": "iid"},
        },
    }
    return parse_job(sections, where="job")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")  # short: it holds sockets
    write_backbone(folder / "backbone")
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "test.jsonl", 12)
    return folder


@pytest.fixture(scope="module")
def partners(folder: Path) -> Iterator[Partners]:
    with Partners(folder / "p", job_of(folder)) as running:
        running.join_all()
        running.start_faulty("site-00", "recorded")
        running.start_faulty("site-01", "recorded", "late", f"crash=no such word: {CANARY}")
        running.start_faulty("site-02", "recorded")
        yield running


def found_in(folder: Path) -> list[str]:
    """Files below ``folder`` that have the word."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


def test_a_word_of_the_data_is_in_nothing_that_leaves_and_nothing_that_is_kept(
    partners: Partners, folder: Path
) -> None:
    run = partners.submit(job_of(folder))
    partners.until(lambda: partners.state(run) == "finished")
    history = partners.rounds(run)
    dropped = [(drop["site"], drop["reason"]) for line in history for drop in line["dropped"]]
    assert dropped == [("site-01", "RuntimeError")]  # its class, and no more

    masked = partners.submit(job_of(folder, secure_aggregation={"enabled": True}))
    partners.until(lambda: partners.state(masked) == "finished")

    path = Path(load_site(partners.folder / "site-02" / "site.toml").data.train)
    with path.open("a") as file:
        file.write(json.dumps({"text": f"very {CANARY}", "label": CANARY}) + "\n")
    partners.end("site-02")  # it has its rows in memory
    partners.start_faulty("site-02", "recorded")
    refused = partners.submit(job_of(folder))
    partners.until(lambda: partners.state(refused) == "finished")
    assert {line["sites"] for line in partners.rounds(refused)} == {2}

    for name in partners.data:
        partners.end(name)
        sent = (partners.folder / name / SENT).read_bytes()
        paths = (b"POST /v1/fleet/push-object", b"/fedgraft.v1.")
        for known in (*paths, name.encode(), b"TrainReply"):
            assert known in sent, "what was sent is not what was recorded"
        assert CANARY.encode() not in sent
    (partners.folder / "sees.txt").write_text(CANARY)
    assert found_in(partners.folder) == [str(partners.folder / "sees.txt")]
