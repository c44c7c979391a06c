"""A backbone is found by its name, or refused with what to do about it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.bert_folders import IMAGE, edit_config, move_weights, open_model, refused, same
from torch import nn

from fedgraft.common.backbones.load import find_backbone

# --- finding


def test_a_folder_is_found_by_its_path(folder: Path) -> None:
    found = find_backbone(f"path:{folder}")
    assert found.folder == folder
    assert found.source == f"path:{folder}"
    assert found.weights == "pretrained"
    assert found.config["model_type"] == "bert"


def test_the_built_in_backbone_is_found_and_loads() -> None:
    digits = tuple("0123456789")
    loaded = open_model("builtin:glyph-vit", labels=digits, task=IMAGE)
    assert not loaded.fresh_head
    assert loaded.parameters == 227_722  # what its README says


def test_an_unknown_built_in_names_those_there_are() -> None:
    assert "glyph-vit" in refused(lambda: find_backbone("builtin:gpt-9")).hint


@pytest.mark.parametrize("name", ["..", "../builtin/glyph-vit", "glyph-vit/..", ""])
def test_a_built_in_is_a_name_and_no_path(name: str) -> None:
    refused(lambda: find_backbone(f"builtin:{name}"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty download cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@v1", "a/b/c", "@", "..", "-"])
def test_a_hub_model_that_cannot_be_fetched_is_an_error_that_names_the_way_out(
    hub: Path, name: str
) -> None:
    error = refused(lambda: find_backbone(f"hf:{name}"))
    assert f"hf:{name}" in str(error)
    assert "path:DIR" in error.hint


def test_a_hub_model_is_taken_in_the_revision_asked_for(hub: Path, saved: Path) -> None:
    root = hub / "models--org--tiny"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / name).write_text(commit)
        shutil.copytree(saved, root / "snapshots" / commit)
    assert find_backbone("hf:org/tiny").folder.name == "a" * 40
    assert find_backbone("hf:org/tiny@v2").folder.name == "b" * 40


# --- refusing


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize(
    "name",
    ["model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "x.pickle", "tf_model.h5", "x.msgpack"],
)
def test_weights_that_can_run_code_are_refused_by_name(
    folder: Path, name: str, weights: str
) -> None:
    (folder / name).write_bytes(b"")
    error = refused(lambda: find_backbone(f"path:{folder}", weights=weights))
    assert name in str(error)
    assert "safetensors" in error.hint


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_config_that_asks_for_remote_code_is_refused(folder: Path, weights: str) -> None:
    edit_config(folder, auto_map={"AutoModel": "modeling_evil.Evil"})
    error = refused(lambda: find_backbone(f"path:{folder}", weights=weights))
    assert "auto_map" in str(error)


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in str(refused(lambda: find_backbone(f"path:{folder}")))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(lambda: find_backbone(f"path:{tmp_path / 'none'}"))


@pytest.mark.parametrize("text", [b"{", b"", b"null", b"5", b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    assert "config.json is not JSON" in str(refused(lambda: find_backbone(f"path:{folder}")))


@pytest.mark.parametrize("text", ["[]", '"bert"', "{}", '{"model_type": "nope"}'])
def test_a_config_that_is_no_model_is_refused_at_the_latest_on_loading(
    folder: Path, text: str
) -> None:
    (folder / "config.json").write_text(text)
    refused(lambda: open_model(folder))


def test_pretrained_weights_must_be_safetensors_and_random_ones_need_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    error = refused(lambda: find_backbone(f"path:{folder}"))
    assert "no .safetensors" in str(error)
    assert '"random"' in error.hint
    assert find_backbone(f"path:{folder}", weights="random").weights == "random"


def test_a_folder_with_a_name_like_a_file_is_no_reason_to_fail(folder: Path) -> None:
    (folder / "onnx.json").mkdir()
    assert find_backbone(f"path:{folder}").folder == folder


@pytest.mark.parametrize("spoil", ["garbage", "cut", "empty"])
def test_broken_weights_are_an_error_of_the_backbone(folder: Path, spoil: str) -> None:
    weights = folder / "model.safetensors"
    content = {"garbage": b"garbage" * 99, "cut": weights.read_bytes()[:-50], "empty": b""}
    weights.write_bytes(content[spoil])
    assert str(folder) in str(refused(lambda: open_model(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 33},
        {"hidden_size": "wide"},
        {"hidden_act": "nope"},
        {"id2label": ["cat", "dog", "owl"]},
        {"id2label": {"first": "cat"}},
    ],
)
def test_a_config_that_makes_no_sense_is_an_error_of_the_backbone(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_config(folder, **changes)
    refused(lambda: open_model(folder))


def test_weights_of_other_shapes_than_the_configs_are_refused(folder: Path) -> None:
    # Otherwise the backbone would silently be a random one.
    edit_config(folder, hidden_size=64)
    refused(lambda: open_model(folder))


@pytest.mark.parametrize("where", ["sub/w.bin", "sub/w.dat", "w.dat", "../w.bin"])
def test_an_index_that_names_pickled_shards_is_refused(folder: Path, where: str) -> None:
    move_weights(folder, folder / where, torch.save)
    refused(lambda: open_model(folder))


def test_shards_that_an_index_names_are_read_beside_it(original: nn.Module, folder: Path) -> None:
    move_weights(folder, folder / "model-00001-of-00001.safetensors", save_file)
    (folder / "decoy.safetensors").unlink()
    assert same(open_model(folder).model, original)


def test_a_model_of_another_task_is_refused(saved: Path) -> None:
    error = refused(lambda: open_model(saved, task=IMAGE))
    assert IMAGE in str(error)
    assert "AutoModelForImageClassification" in error.hint
