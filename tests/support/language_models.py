"""Small random language models with a tokenizer of characters, and jobs that train them."""

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["CHARACTERS", "CLOZE", "job_settings", "save_language_model", "save_tokenizer"]

CHARACTERS = ["<pad>", "<eos>", *string.ascii_letters, *" .,;:!?'-&3$\n"]
"""No token stands for a character that is not here: it becomes none."""

SHAPE = {"vocab_size": len(CHARACTERS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


CLOZE = ["<mask>", "<cls>"]
"""Tokens that a model of gaps has beside: it reads ``<cls>``, the text, ``<eos>``."""


def save_tokenizer(folder: Path, *, cloze: bool = False) -> None:
    """One token a character."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [*CHARACTERS, *(CLOZE if cloze else ())]
    ids = {character: index for index, character in enumerate(every)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    around = {}
    if cloze:
        pairs = [("<cls>", ids["<cls>"]), ("<eos>", ids["<eos>"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<cls> $A <eos>", pair=None, special_tokens=pairs
        )
        around = {"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<eos>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        **around,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_language_model(kind: str, folder: Path, *, size: int = 16) -> Path:
    """A random ``gpt2``, ``llama``, ``bert`` or ``t5`` of width ``size`` with two layers."""
    torch.manual_seed(3)
    model: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(**SHAPE, n_embd=size, n_layer=2, n_head=2, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **SHAPE, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif kind == "bert":
        shape = {**SHAPE, "vocab_size": len(CHARACTERS) + len(CLOZE)}
        config = transformers.BertConfig(
            **shape, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.T5Config(
            **SHAPE, d_model=size, d_kv=size // 2, d_ff=2 * size, num_layers=2, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    save_tokenizer(folder, cloze=kind == "bert")
    return folder


def job_settings(
    kind: str, backbone: Path, train: str, *, test: str | None = None, **data: Any
) -> dict[str, Any]:
    """A job of two rounds for a backbone that ``save_language_model`` made."""
    targets = {
        "gpt2": ["c_attn"],
        "llama": ["q_proj", "v_proj"],
        "bert": ["query", "value"],
        "t5": ["q", "v"],
    }[kind]
    task = {"t5": "seq2seq-lm", "bert": "masked-lm"}.get(kind, "causal-lm")
    simulation = {"train": train, "test": test, "partition": {"kind": "natural"}}
    return {
        "job": {"name": kind, "task": task},
        "backbone": {"source": f"path:{backbone}"},
        "method": {"kind": "lora", "rank": 2, "targets": targets, "head": "frozen"},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "rounds": {"count": 2, "min_sites": 2},
        "data": {"max_length": 32, "validation": 0.2, **data},
        "simulation": {key: value for key, value in simulation.items() if value is not None},
    }
