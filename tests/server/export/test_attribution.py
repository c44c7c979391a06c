"""Attributions add up to what they explain, point at what matters, and come out of the command."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import command
from support.federations import run_digits, write_digits
from support.trainings import noisy, open_small

from fedgraft.common.encoding import Settings
from fedgraft.common.errors import InputError
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.modalities.text import TextProcessor
from fedgraft.server.export.attribution import EXPLAINERS, explain_image, explain_text


class Words:
    """A tokenizer of numbers."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{one}>" for one in ids]


@pytest.fixture
def bench() -> Any:
    found = open_small("bert").bench
    object.__setattr__(found, "processor", TextProcessor(Words(), 0, False, 64))
    found.put((found.layout, noisy(found)))
    yield found
    found.put()


@torch.inference_mode()
def log_odds(bench: Any, ids: list[int], label: int) -> float:
    given = torch.tensor([ids])
    logits = bench.model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0]
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return float(logits[label] - others.logsumexp(0))


@pytest.mark.parametrize("label", [None, 3])
def test_the_weights_of_tokens_add_up(bench: Any, label: int | None) -> None:
    ids = [5, 9, 12, 30, 7]
    found = explain_text(bench, " ".join(map(str, ids)), Settings(max_length=32), label)
    assert found.label == (int(found.probabilities.argmax()) if label is None else label)
    silent = [ids[0], 0, 0, 0, ids[-1]]
    wanted = log_odds(bench, ids, found.label) - log_odds(bench, silent, found.label)
    assert float(found.weights.sum()) == pytest.approx(wanted, abs=max(0.05, 2 * found.missing))
    assert found.parts == tuple(f"<{one}>" for one in ids)
    assert found.weights[0] == found.weights[-1] == 0  # the same in what says nothing
    assert np.abs(found.weights[1:-1]).max() > 1e-3


def test_a_text_of_nothing_is_refused(bench: Any) -> None:
    with pytest.raises(InputError, match="no tokens"):
        explain_text(bench, "", Settings(max_length=32))


def test_the_weights_of_pixels_add_up(tmp_path: Path) -> None:
    write_digits(tmp_path, 3, 1)
    path = next(tmp_path.glob("train/*/*.png"))
    found = open_small("vit").bench
    found.put((found.layout, noisy(found)))
    seen = explain_image(found, str(path), Settings(normalize="per-image"))
    processor: Any = found.processor
    pixels = torch.from_numpy(processor.pixels([Image.open(path)], "per-image"))
    model: Any = found.model
    with torch.inference_mode():
        both = model(pixel_values=torch.cat([pixels, torch.zeros_like(pixels)])).logits
    found.put()
    others = [n for n in range(both.shape[1]) if n != seen.label]
    odds = both[:, seen.label] - both[:, others].logsumexp(1)
    assert float(seen.weights.sum()) == pytest.approx(float(odds[0] - odds[1]), abs=0.1)
    assert seen.weights.shape == processor.size


def test_without_captum_it_says_what_to_install(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(InputError, match="needs captum") as caught:
        explain_text(bench, "4 5 6", Settings(max_length=8))
    assert "fedgraft[explain]" in caught.value.hint


# The command


def test_texts_and_images_at_least_are_explained() -> None:
    assert {"text", "image"} <= EXPLAINERS.keys() <= MODALITIES.keys()


@pytest.mark.slow
def test_a_run_explains_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = run_digits(tmp_path / "runs", "rounds.count=1")
    write_digits(tmp_path, 3, 1)
    path, picture = next(tmp_path.glob("train/*/*.png")), tmp_path / "heat.png"
    asked = ("explain", str(run.folder), str(path), "--out", str(picture))
    code, out, err = command(capsys, *asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["label"] in run.job.job.labels and 0 < told["probability"] <= 1
    assert Image.open(picture).size[0] > 500
    for wrong, why in (
        ((*asked, "--label", "x"), "no label x"),
        (("explain", str(run.folder), str(tmp_path / "none.png")), "none.png"),
        (("explain", str(tmp_path), str(path)), "run"),
    ):
        code, out, err = command(capsys, *wrong)
        assert code == 2 and why in err, err
