"""An example's answer does not depend on the padding that its batch puts before it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from support.trainings import LABELS, settings, task, texts
from tokenizers import Tokenizer, models

from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.model.forward import Feed, open_feed, predict
from fedgraft.client.training.trainer import train_alone
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.examples import TextExamples

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "max_position_embeddings": 70,
}  # fmt: skip
# The configuration, and the modules that train if some layers are to stay the same.
MODELS: dict[str, tuple[Any, list[str]]] = {
    "gpt2": (
        lambda: hf.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=64, pad_token_id=0,
            initializer_range=0.3,
        ),
        ["h.2.attn.c_attn"],
    ),
    "bert": (lambda: hf.BertConfig(**SMALL), ["layer.2.attention.self.query"]),
    "opt": (
        lambda: hf.OPTConfig(
            **{**SMALL, "max_position_embeddings": 64}, ffn_dim=24, word_embed_proj_dim=16,
            init_std=0.3,
        ),
        ["layers.2.self_attn.q_proj"],
    ),
    "gpt-neo": (
        lambda: hf.GPTNeoConfig(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
            attention_types=[[["global"], 2]], max_position_embeddings=64, initializer_range=0.3,
            pad_token_id=0, bos_token_id=None, eos_token_id=None,
        ),
        ["h.1.attn.attention.q_proj"],
    ),
    "roberta": (lambda: hf.RobertaConfig(**SMALL), ["layer.2.attention.self.query"]),
    "electra": (
        lambda: hf.ElectraConfig(**SMALL, embedding_size=16), ["layer.2.attention.self.query"]
    ),
    "llama": (
        lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=1), ["layers.2.self_attn.q_proj"]
    ),
    "xlnet": (
        lambda: hf.XLNetConfig(
            vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=24, pad_token_id=0,
            bos_token_id=None, eos_token_id=None, initializer_range=0.3,
        ),
        ["layer.2.ff.layer_1"],
    ),
}  # fmt: skip


KEPT = set(MODELS) - {"gpt-neo", "xlnet"}  # which have no prefix for other reasons


def write_backbone(config: Any, folder: Path) -> None:
    config.save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    facts["padding_side"] = "left"
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def open_left(name: str, folder: Path, *, head: str = "frozen") -> Stack:
    """The stack of a model whose tokenizer pads on the left; its adapter is not the initial one."""
    make, targets = MODELS[name]
    write_backbone(make(), folder)
    raw = {
        "job": {"name": "t", "task": "text-classification", "labels": LABELS},
        "backbone": {"source": f"path:{folder}", "weights": "random"},
        "method": {"kind": "lora", "rank": 2, "targets": targets, "head": head},
        "data": {"max_length": 48},
    }
    stack = open_stack(parse_job(raw, where="test"))
    assert stack.bench.processor.pad_left
    return stack


def answers(stack: Stack, feed: Feed, index: NDArray[np.int64]) -> torch.Tensor:
    noise = np.random.default_rng(0).normal(0, 0.05, stack.bench.layout.size)
    stack.put_one(stack.bench.layout, (stack.bench.initial + noise).astype(np.float32))
    with torch.inference_mode():
        return predict([feed], [index], feed.width(index))[0]


def rows() -> TextExamples:
    return texts(24, pad_left=True)


@pytest.mark.parametrize("kept", [False, True], ids=["computed", "kept"])
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_does_not_depend_on_the_other_examples(
    name: str, kept: bool, tmp_path: Path
) -> None:
    stack = open_left(name, tmp_path / "backbone")
    store = Store(tmp_path / "store", memory=10**8, disk=0) if kept else None
    feed = open_feed(stack, stack.bench.layout, rows(), store)
    assert (feed.kept is not None) == (kept and name in KEPT)
    plain = Feed(stack, rows(), None, None)
    alone = torch.cat([answers(stack, plain, np.array([row])) for row in range(24)])
    for some in (feed, plain):
        together = answers(stack, some, np.arange(24))
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_padding_on_either_side_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    stack = open_left(name, tmp_path / "backbone")
    left, right = (Feed(stack, texts(24, pad_left=side), None, None) for side in (True, False))
    every = np.arange(24)
    torch.testing.assert_close(
        answers(stack, left, every), answers(stack, right, every), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_training_comes_to_the_same_on_either_side(name: str, tmp_path: Path) -> None:
    stack = open_left(name, tmp_path / "backbone", head="shared")
    start, wanted = stack.bench.initial, settings(learning_rate=1e-2)
    ends = [
        train_alone(
            stack, stack.bench.layout, task(texts(24, pad_left=side), start), settings=wanted
        ).vector
        for side in (True, False)
    ]
    assert np.abs(ends[0] - start).max() > 1e-3
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-4)


def test_a_model_that_reads_the_last_position_is_padded_before_the_tokens(tmp_path: Path) -> None:
    stack = open_left("xlnet", tmp_path / "backbone")
    assert Feed(stack, rows(), None, None).left
    assert not Feed(open_left("gpt2", tmp_path / "other"), rows(), None, None).left


def test_texts_that_are_never_padded_decide_nothing(tmp_path: Path) -> None:
    stack = open_left("xlnet", tmp_path / "backbone")
    full = replace(rows().subset(np.array([0])), longest=int(rows().lengths[0]))
    Feed(stack, full, None, None)
    assert stack.padding.right is None
    assert Feed(stack, rows(), None, None).left


def test_a_site_among_others_is_padded_as_it_is_alone(tmp_path: Path) -> None:
    stack = open_left("bert", tmp_path / "backbone")
    flat = torch.from_numpy(np.stack([stack.bench.initial] * 3))
    stack.put(stack.bench.layout, flat)
    assert not Feed(stack, rows(), None, None).left


def test_activations_that_depend_on_the_padding_are_not_kept(tmp_path: Path) -> None:
    stack = open_left("bert", tmp_path / "backbone")
    stack.padding.right = False
    assert open_feed(stack, stack.bench.layout, rows(), None).prefix is None
    stack.padding.right = True
    stack.prefixes.clear()
    assert open_feed(stack, stack.bench.layout, rows(), None).prefix is not None
