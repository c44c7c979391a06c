"""What identifies a backbone: any byte that decides what it computes, and nothing else."""

from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.bert_folders import edit_config, move_weights

from fedgraft.common.backbones.load import find_backbone
from fedgraft.common.errors import BackboneError


def fingerprint(folder: Path, weights: str = "pretrained") -> str:
    return find_backbone(f"path:{folder}", weights=weights).fingerprint


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_any_byte_of_the_weights_changes_the_fingerprint(folder: Path, position: int) -> None:
    before = fingerprint(folder)
    flip(folder / "model.safetensors", position)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "vocab.txt", "spiece.model", "extra.safetensors"]
)
def test_config_tokenizer_and_further_weights_are_in_the_fingerprint(
    folder: Path, name: str
) -> None:
    bare = fingerprint(folder)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    longer = fingerprint(folder)
    assert longer != bare
    if name in ("config.json", "tokenizer.json"):
        return
    flip(folder / name, 0)
    assert fingerprint(folder) != longer


def test_the_names_of_files_are_in_the_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "tokenizer.json").rename(folder / "tokens.json")
    assert fingerprint(folder) != before


@pytest.mark.parametrize("where", ["sub/w.safetensors", "../w.safetensors"])
def test_shards_elsewhere_are_refused_or_in_the_fingerprint(folder: Path, where: str) -> None:
    move_weights(folder, folder / where, save_file)
    try:
        before = fingerprint(folder)
    except BackboneError:
        return
    flip(folder / where, -1)
    assert fingerprint(folder) != before


def test_what_only_people_read_is_not_in_the_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    for name in ("README.md", "LICENSE", "picture.png"):
        (folder / name).write_text("x")
    assert fingerprint(folder) == before


def test_a_copy_elsewhere_has_the_same_fingerprint(folder: Path, saved: Path) -> None:
    assert fingerprint(folder) == fingerprint(saved)


def test_random_weights_are_identified_by_the_config_alone(folder: Path) -> None:
    before = fingerprint(folder, "random")
    assert before != fingerprint(folder)
    flip(folder / "model.safetensors", -1)
    (folder / "tokenizer.json").unlink()
    assert fingerprint(folder, "random") == before
    edit_config(folder, hidden_act="relu")
    assert fingerprint(folder, "random") != before
