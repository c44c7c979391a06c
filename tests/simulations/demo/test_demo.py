"""The demonstration's parts: drawn digits, real digits, and the backbone that ships."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification

import fedgraft.common
from fedgraft.simulations.demo import digits, glyphs, pretrain

SHIPPED = Path(fedgraft.common.__file__).parent / "builtin" / "glyph-vit"


@pytest.fixture(scope="module")
def backbone() -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(SHIPPED, dtype=torch.float32).eval()


def test_a_seed_decides_the_drawings() -> None:
    images, labels = glyphs.draw(100, np.random.default_rng(3))
    again, labels_again = glyphs.draw(100, np.random.default_rng(3))
    other, _ = glyphs.draw(100, np.random.default_rng(4))
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    assert not np.array_equal(images, other)


def test_drawings_are_grey_images_of_every_digit() -> None:
    images, labels = glyphs.draw(300, np.random.default_rng(0))
    assert images.shape == (300, 8, 8) and images.dtype == np.float32
    assert labels.shape == (300,) and labels.dtype == np.int64
    assert images.min() >= 0 and images.max() <= 1
    assert set(labels.tolist()) == set(range(10))
    assert images.std(axis=(1, 2)).min() > 0.05  # none is blank


def test_drawings_obey_their_options() -> None:
    clean, _ = glyphs.draw(200, np.random.default_rng(0), noise=0, inverted=0)
    dark, _ = glyphs.draw(200, np.random.default_rng(0), noise=0, inverted=1)
    bold, _ = glyphs.draw(200, np.random.default_rng(0), noise=0, inverted=0, thickness=(0.1, 0.11))
    assert np.allclose(dark, 1 - clean, atol=1e-6)
    assert bold.mean() > 1.3 * clean.mean()
    # The left and right edges are mostly ground: digits are higher than wide.
    assert clean[:, :, [0, -1]].mean() < 0.5 * clean.mean()


def test_no_drawing_is_a_valid_request_and_a_negative_number_is_not() -> None:
    images, labels = glyphs.draw(0, np.random.default_rng(0))
    assert images.shape == (0, 8, 8) and labels.shape == (0,)
    with pytest.raises(ValueError, match="-1 digits"):
        glyphs.draw(-1, np.random.default_rng(0))


def test_real_digits_are_split_by_seed_and_class() -> None:
    train, test = digits.load()
    assert (len(train), len(test)) == (1257, 540)
    assert train.features["label"].names == [str(digit) for digit in range(10)]
    for part in (train, test):
        shares = np.bincount(part["label"], minlength=10) / len(part)
        assert np.allclose(shares, 0.1, atol=0.01)
    assert list(train["label"]) == list(digits.load()[0]["label"])
    assert list(train["label"]) != list(digits.load(seed=1)[0]["label"])


def test_real_digits_are_grey_images_in_the_full_range() -> None:
    images = digits.load()[1]["image"][:50]
    assert {(image.mode, image.size) for image in images} == {("L", (8, 8))}
    stack = np.stack([np.asarray(image) for image in images])
    assert stack.dtype == np.uint8 and (stack.min(), stack.max()) == (0, 255)


def test_the_shipped_backbone_is_small_and_names_no_machine() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 1_500_000
    config = (SHIPPED / "config.json").read_text(encoding="utf-8")
    assert "_name_or_path" not in config and "/" not in config


def test_the_shipped_backbone_reads_new_drawings(backbone: ViTForImageClassification) -> None:
    pixels, labels = glyphs.draw(400, np.random.default_rng(99))
    images = pretrain.standardise(torch.from_numpy(pixels)[:, None])
    assert pretrain.accuracy(backbone, images, torch.from_numpy(labels)) >= 0.9
    assert backbone.config.id2label == {digit: str(digit) for digit in range(10)}


def test_the_shipped_backbone_leaves_real_digits_to_be_learnt(
    backbone: ViTForImageClassification,
) -> None:
    _, test = digits.load()
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in test["image"]])
    images = pretrain.standardise(torch.from_numpy(pixels)[:, None])
    assert 0.6 < pretrain.accuracy(backbone, images, torch.tensor(test["label"])) < 0.9


def test_pretraining_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(12)
    before = torch.random.get_rng_state()
    recipe = pretrain.Recipe(images=64, epochs=1, batch_size=32)
    first, again, other = (pretrain.pretrain(recipe, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_saved_backbone_loads_as_it_was_but_for_rounding(tmp_path: Path) -> None:
    backbone = pretrain.build(seed=0).eval()
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    with torch.no_grad():
        expected = backbone(pixel_values=image).logits
        pretrain.save(backbone, tmp_path)
        loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
        assert loaded.dtype == torch.float32
        assert torch.allclose(loaded(pixel_values=image).logits, expected, atol=1e-2)


def test_the_model_card_states_recipe_and_scores() -> None:
    scores = pretrain.Scores(0.9712, 2000, 0.8064, 1797)
    card = pretrain.describe(pretrain.Recipe(), 7, scores)
    assert "40,000 drawn" in card.replace("\n", " ") and "--seed 7" in card
    assert "| 2,000 | 0.971 |" in card and "| 1,797 | 0.806 |" in card
    assert "license: apache-2.0" in card
