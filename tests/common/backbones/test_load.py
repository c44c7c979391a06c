"""The frozen model: what is refused, what identifies it, and what loading it leaves untouched."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from fedgraft.common.backbones.load import LoadedBackbone, find_backbone, head_names, load
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError

LABELS = ("cat", "dog", "owl")
TOKENS = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
TEXT, IMAGE = "text-classification", "image-classification"


def bert_config(labels: tuple[str, ...] = LABELS) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """A BERT with a trained head, as its maker has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BertForSequenceClassification(bert_config()).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; not to be written to."""
    folder = tmp_path_factory.mktemp("bert")
    original.save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the BERT folder to spoil."""
    shutil.copytree(saved, tmp_path / "bert")
    return tmp_path / "bert"


def job(
    source: Path | str,
    *,
    labels: tuple[str, ...] = LABELS,
    task: str = TEXT,
    seed: int = 0,
    weights: str = "pretrained",
) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "t", "task": task, "labels": labels, "seed": seed},
            "backbone": {
                "source": f"path:{source}" if isinstance(source, Path) else source,
                "weights": weights,
            },
            "method": {"kind": "head"},
        }
    )


def open_model(source: Path | str, **keys: Any) -> LoadedBackbone:
    settings = job(source, **keys)
    found = find_backbone(settings.backbone.source, weights=settings.backbone.weights)
    return load(found, settings)


def refused(call: Callable[[], object]) -> BackboneError:
    with pytest.raises(BackboneError) as caught:
        call()
    assert caught.value.hint
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


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


def move_weights(folder: Path, shard: Path, save: Callable[[Any, Path], None]) -> None:
    """Put the weights into ``shard``, which an index file names: transformers follows it."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    shard.parent.mkdir(exist_ok=True)
    save(tensors, shard)
    where = os.path.relpath(shard, folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "decoy.safetensors").write_bytes(b"")


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


# --- the fingerprint


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


# --- loading


def test_a_loaded_model_is_frozen_in_eval_mode_and_fp32(saved: Path, tmp_path: Path) -> None:
    half = BertForSequenceClassification.from_pretrained(saved).half()
    half.save_pretrained(tmp_path)
    for loaded in (open_model(saved), open_model(tmp_path), open_model(saved, weights="random")):
        parameters = list(loaded.model.parameters())
        assert not any(parameter.requires_grad for parameter in parameters)
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        assert not any(module.training for module in loaded.model.modules())
        assert loaded.parameters == sum(parameter.numel() for parameter in parameters)


def test_with_the_jobs_own_labels_the_model_is_the_makers(original: nn.Module, saved: Path) -> None:
    loaded = open_model(saved)
    assert not loaded.fresh_head
    assert same(loaded.model, original)
    with torch.no_grad():
        assert torch.equal(loaded.model(**TOKENS).logits, original(**TOKENS).logits)


@pytest.mark.parametrize(
    "labels",
    [("dog", "cat", "owl"), ("cat", "dog", "fox"), ("cat", "dog"), ("cat", "dog", "owl", "fox")],
)
def test_a_head_for_other_labels_is_drawn_afresh_and_the_rest_kept(
    original: nn.Module, saved: Path, labels: tuple[str, ...]
) -> None:
    loaded = open_model(saved, labels=labels)
    model: Any = loaded.model
    assert loaded.fresh_head
    assert same(model.bert, original.get_submodule("bert"))
    assert model.classifier.weight.shape == (len(labels), 32)
    assert model.classifier.weight.any()
    assert not model.classifier.bias.any()
    if len(labels) == len(LABELS):
        assert not same(model.classifier, original.get_submodule("classifier"))
    assert model.config.id2label == dict(enumerate(labels))


def test_a_folder_without_a_head_gets_a_fresh_one(tmp_path: Path) -> None:
    BertModel(bert_config()).save_pretrained(tmp_path)
    assert open_model(tmp_path).fresh_head


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_what_is_drawn_depends_on_the_jobs_seed_and_nothing_else(saved: Path, weights: str) -> None:
    def draw(seed: int, state: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            return open_model(saved, labels=("x", "y", "z"), seed=seed, weights=weights).model

    first, again, other = draw(0, 1), draw(0, 2), draw(1, 1)
    assert same(first, again)
    assert not same(first.get_submodule("classifier"), other.get_submodule("classifier"))
    backbones = [model.get_submodule("bert") for model in (first, other)]
    assert same(*backbones) == (weights == "pretrained")


def test_random_weights_take_the_shape_of_the_config_and_nothing_of_the_file(
    original: nn.Module, saved: Path
) -> None:
    loaded = open_model(saved, weights="random")
    assert loaded.fresh_head
    assert loaded.parameters == sum(p.numel() for p in original.parameters())
    embeddings = "bert.embeddings.word_embeddings"
    assert not same(loaded.model.get_submodule(embeddings), original.get_submodule(embeddings))


@pytest.mark.parametrize(
    "keys", [{}, {"labels": ("x", "y")}, {"weights": "random"}], ids=["kept", "fresh", "random"]
)
def test_global_random_generators_are_untouched(saved: Path, keys: dict[str, Any]) -> None:
    torch_before = torch.get_rng_state()
    numpy_before = copy.deepcopy(np.random.get_state(legacy=False))
    open_model(saved, **keys)
    assert torch.equal(torch.get_rng_state(), torch_before)
    numpy_after: Any = np.random.get_state(legacy=False)
    assert str(numpy_after) == str(numpy_before)


def test_heads_are_found_whatever_the_architecture_calls_them() -> None:
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    gpt2 = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        assert head_names(BertForSequenceClassification(bert_config())) == ("classifier",)
        assert head_names(ResNetForImageClassification(resnet)) == ("classifier",)
        assert head_names(GPT2ForSequenceClassification(gpt2)) == ("score",)


def test_a_convolutional_model_keeps_its_running_statistics(tmp_path: Path) -> None:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = ResNetForImageClassification(config)
        made(torch.randn(4, 1, 8, 8) * 3 + 1)  # in training mode: moves the statistics
    made.eval().save_pretrained(tmp_path)
    loaded = open_model(tmp_path, task=IMAGE, labels=LABELS)
    assert same(loaded.model, made)
    picture = torch.ones(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.model(picture).logits, made(picture).logits)
