"""A small random configuration of every architecture in the guide, and rows that it can read."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from support.clips import LABELS as WAYS
from support.clips import write_clips
from support.federations import write_digits
from support.recordings import LABELS as PITCHES
from support.recordings import write_tones
from tokenizers import Tokenizer, models, pre_tokenizers

from fedgraft.common.backbones.cifar_resnet import CifarResnetConfig
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job

__all__ = ["FAMILIES", "family_job"]

WORDS = ["[PAD]", "[UNK]", "good", "bad", "card", "lost", "the", "my"]
DIGITS = [str(digit) for digit in range(10)]
_BERT: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
_VIT: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
_SPEECH: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8, 8), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    "vocab_size": 8,
}  # fmt: skip
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _clip() -> Any:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **_TOKENS}
    vision = {**_VIT, "num_channels": 3}
    return hf.CLIPConfig(text_config={**text, "vocab_size": 8}, vision_config=vision)


def _xlnet() -> Any:
    return hf.XLNetConfig(
        vocab_size=len(WORDS), d_model=16, n_layer=2, n_head=2, d_inner=24, **_TOKENS
    )


def _whisper() -> Any:
    return hf.WhisperConfig(
        num_mel_bins=16, d_model=16, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
        max_source_positions=50, classifier_proj_size=8, vocab_size=8, decoder_start_token_id=1,
        **_TOKENS,
    )  # fmt: skip


# What makes the configuration, what of it is adapted, and what it reads.
FAMILIES: dict[str, tuple[Any, Any, str]] = {
    "resnet": (
        lambda: hf.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1],
            layer_type="basic", image_size=8,
        ),
        "all-conv",
        "image",
    ),
    "cifar-resnet": (lambda: CifarResnetConfig(blocks=1, width=8, num_channels=1), "all-conv",
                     "image"),
    "efficientnet": (
        lambda: hf.EfficientNetConfig(
            num_channels=1, image_size=32, width_coefficient=0.25, depth_coefficient=0.1,
            hidden_dim=320, initializer_range=0.3,  # with its own, 0.02, signals die out at once
        ),
        "all-conv",
        "image",
    ),
    "vit": (lambda: hf.ViTConfig(**_VIT), "all-linear", "image"),
    "dinov2": (lambda: hf.Dinov2Config(**_VIT), "all-linear", "image"),
    "bert": (lambda: hf.BertConfig(**_BERT), "all-linear", "text"),
    "roberta": (lambda: hf.RobertaConfig(**_BERT), "all-linear", "text"),
    "xlnet": (_xlnet, "all-linear", "text"),
    "wav2vec2": (
        lambda: hf.Wav2Vec2Config(feat_extract_norm="layer", **_SPEECH), "all-linear", "audio"
    ),
    "hubert": (lambda: hf.HubertConfig(**_SPEECH), "all-linear", "audio"),
    "whisper": (_whisper, "all-linear", "audio"),
    "clip": (_clip, "all-linear", "image"),
    "videomae": (
        lambda: hf.VideoMAEConfig(**{**_VIT, "num_channels": 3}, num_frames=4, tubelet_size=2),
        "all-linear",
        "video",
    ),
}  # fmt: skip


def _timm(architecture: str, side: int, **arguments: Any) -> Any:
    prepared = {"input_size": [3, side, side], "crop_pct": 1.0}
    config = hf.TimmWrapperConfig(
        architecture=architecture, model_args=arguments, pretrained_cfg=prepared
    )
    config.num_channels, config.image_size = 3, side
    return config


STEEP = ("vgg", "inception")  # without norms, or with random ones: larger steps diverge
if find_spec("timm"):  # an extra of its own, with torchvision
    FAMILIES["vgg"] = (lambda: _timm("vgg11", 32, mlp_ratio=0.01), "all-conv", "image")
    FAMILIES["inception"] = (lambda: _timm("inception_v3", 80), "all-conv", "image")
    FAMILIES["timm-vit"] = (
        lambda: _timm("vit_tiny_patch16_224", 32, img_size=32, depth=2, embed_dim=24),
        "all-linear",
        "image",
    )


def family_job(name: str, folder: Path, *, partial: bool = False, **changes: Any) -> Job:
    """A job of two rounds over two sites with rows of its own below ``folder``."""
    make, targets, reads = FAMILIES[name]
    _save(make(), folder / "backbone", reads)
    labels = {"image": DIGITS, "audio": list(PITCHES), "video": list(WAYS), "text": ["no", "yes"]}[
        reads
    ]
    raw: dict[str, Any] = {
        "job": {"name": name, "task": f"{reads}-classification", "labels": labels},
        "backbone": {"source": f"path:{folder / 'backbone'}"},
        "method": {"kind": "partial", "blocks": 1, "norms": True, "head": "shared"}
        if partial
        else {"kind": "lora", "rank": 2, "head": "shared", "targets": targets},
        "training": {"batch_size": 8, "learning_rate": 5e-3 if name in STEEP else 5e-2},
        "rounds": {"count": 2},
        "data": {"max_length": 16, "seconds": 0.5, "validation": 0.2},
        "simulation": {
            **_rows(folder, reads), "sites": 2, "baselines": [], "finetune_epochs": 0,
            "partition": {"kind": "iid"}, "workers": 0, **changes,
        },
    }  # fmt: skip
    return parse_job(raw, where="test")


def _save(config: Any, folder: Path, reads: str) -> None:
    """Weights, and with a text model its tokenizer."""
    auto = {
        "image": hf.AutoModelForImageClassification,
        "audio": hf.AutoModelForAudioClassification,
        "video": hf.AutoModelForVideoClassification,
        "text": hf.AutoModelForSequenceClassification,
    }[reads]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model = auto.from_config(config)
        _settle(model)
        model.save_pretrained(folder)
    if reads == "text":
        words = {word: index for index, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))


def _settle(model: Any) -> None:
    """Give batch norm the statistics that training leaves: with 0 and 1 nothing gets through."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches, here one
    if norms:
        side = model.config.image_size
        with torch.no_grad():
            model.train()(pixel_values=torch.randn(64, model.config.num_channels, side, side))
        model.eval()


def _rows(folder: Path, reads: str) -> dict[str, str]:
    if reads == "image":
        write_digits(folder, 40, 10)
    elif reads == "audio":
        write_tones(folder / "train", 12)
        write_tones(folder / "test", 3, seed=1)
    elif reads == "video":
        write_clips(folder / "train", 12)
        write_clips(folder / "test", 3, seed=1)
    else:
        rows = [("the card is good", "yes"), ("my card is lost", "no"), ("bad", "no")] * 8
        lines = "".join(json.dumps({"text": t, "label": name}) + "\n" for t, name in rows)
        for split in ("train.jsonl", "test.jsonl"):
            (folder / split).write_text(lines)
        return {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    return {"train": str(folder / "train"), "test": str(folder / "test")}
