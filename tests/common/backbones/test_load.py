"""The frozen model: what loading it keeps, draws afresh and leaves untouched."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bert_folders import (
    IMAGE,
    LABELS,
    TOKENS,
    bert_config,
    edit_config,
    open_model,
    same,
)
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from fedgraft.common.backbones.load import head_names
from fedgraft.common.tasks import TASKS


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


def test_a_head_of_one_output_is_kept_where_its_folder_says_regression(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made = BertForSequenceClassification(bert_config(("score",))).eval()
    made.save_pretrained(tmp_path)
    stranger = open_model(tmp_path, task="text-regression", labels=())
    assert stranger.fresh_head and "classifier.weight" in stranger.drawn
    assert not same(stranger.model.get_submodule("classifier"), made.classifier)
    assert same(stranger.model.get_submodule("bert"), made.bert)
    edit_config(tmp_path, problem_type="regression")
    own = open_model(tmp_path, task="text-regression", labels=())
    assert not own.fresh_head and not own.drawn and same(own.model, made)


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


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_task_may_name_one_architecture_where_there_is_no_auto_class(
    saved: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["text-classification"]
    monkeypatch.setattr(task, "auto_class", "BertForSequenceClassification")
    loaded = open_model(saved, weights=weights)
    assert type(loaded.model) is BertForSequenceClassification
    assert loaded.fresh_head == (weights == "random")


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
