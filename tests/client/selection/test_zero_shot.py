"""Zero-shot of a dual encoder is what transformers' own model says, and select reports it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.families import FAMILIES
from support.federations import digits_job, write_digits
from tokenizers import Tokenizer, models, pre_tokenizers

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.selection.zero_shot import is_dual, open_dual_encoder
from fedgraft.common.console import Console
from fedgraft.common.errors import BackboneError, JobError
from fedgraft.common.examples import ImageExamples
from fedgraft.simulations.selection.rank import select

WORDS = ["[PAD]", "[UNK]", "</s>", "a", "photo", "of", *map(str, range(10))]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A small CLIP with random weights and a tokenizer."""
    config = FAMILIES["clip"][0]()
    config.text_config.vocab_size, config.text_config.eos_token_id = len(WORDS), 2
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = transformers.CLIPModel(config)
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def pixels(count: int) -> ImageExamples:
    drawn = np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)
    return ImageExamples(np.zeros(count, np.int64), drawn, np.arange(count))


def test_answers_are_those_of_the_model(clip: Path) -> None:
    labels = tuple(map(str, range(10)))
    found = open_dual_encoder(clip, labels, "a photo of a {}").answers(pixels(150))
    model: Any = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    read = tokenizer([f"a photo of a {one}" for one in labels], padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            **as_tensors(pixels(150).batch(np.arange(150))),
        )
    np.testing.assert_array_equal(found, output.logits_per_image.argmax(1).numpy())
    assert len(set(found.tolist())) > 1


def test_the_sentence_matters(clip: Path) -> None:
    labels = ("1", "2", "3")
    one, other = (open_dual_encoder(clip, labels, p).prompts for p in ("{}", "photo of {} a"))
    assert not torch.allclose(one, other)


def test_without_a_tokenizer_it_is_refused(clip: Path) -> None:
    (clip / "tokenizer.json").unlink()
    (clip / "tokenizer_config.json").unlink()
    with pytest.raises(BackboneError, match="text encoder cannot be loaded"):
        open_dual_encoder(clip, ("1", "2"), "{}")


def test_others_are_no_dual_encoders() -> None:
    assert is_dual(FAMILIES["clip"][0]())
    assert not any(is_dual(make()) for name, (make, _, _) in FAMILIES.items() if name != "clip")


def test_select_says_how_many_are_right_without_any_training(clip: Path, tmp_path: Path) -> None:
    rows = write_digits(tmp_path, 40, 30)
    job = digits_job(*rows, f"backbone.source=path:{clip}", "simulation.workers=0")
    found = select(job, {"clip": lambda: job}, shots=(0, 1), console=Console(quiet=True))
    assert not found.failed
    (scored,) = found.scored
    assert scored.tested == 30 and scored.accuracy[0] is not None
    assert scored.accuracy[0] * 30 == pytest.approx(round(scored.accuracy[0] * 30))
    assert scored.accuracy[1] is not None


@pytest.mark.parametrize("prompt", ["a photo", "{} and {}", "{0}", "a {} of {x}"])
def test_a_prompt_has_one_place_for_the_label(prompt: str) -> None:
    with pytest.raises(JobError, match="prompt"):
        digits_job(f"evaluation.prompt='{prompt}'")
