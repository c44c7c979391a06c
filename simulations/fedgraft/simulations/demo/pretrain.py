"""Pre-train the backbone `glyph-vit`: a small vision transformer learns drawn digits.

    python -m fedgraft.simulations.demo.pretrain OUT_DIR [--seed 0]

writes a Hugging Face folder: config.json, model.safetensors and a model card with measured figures.
Real digits are read only to measure the finished backbone; none is used in training. The program
uses one thread and its own generators. Therefore the folder is the same, byte for byte, on every
run with the same machine and package versions.

The architecture is that of A. Dosovitskiy et al., An Image is Worth 16x16 Words (ICLR 2021), with
images of 8 x 8 pixels and patches of 2 x 2.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from fedgraft.common.seeds import derive_seed, numpy_generator, torch_generator
from fedgraft.simulations.demo import digits, glyphs

__all__ = [
    "Recipe",
    "Scores",
    "accuracy",
    "build",
    "describe",
    "main",
    "measure",
    "pretrain",
    "save",
    "standardise",
]


@dataclass(frozen=True)
class Recipe:
    """The settings of drawing and training; the defaults made the included backbone."""

    images: int = 40_000
    epochs: int = 4
    batch_size: int = 128
    peak_learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: float = 0.1  # share of the steps before the peak of the learning rate


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1] of a finished backbone, and the number of images for each."""

    source: float
    source_images: int
    target: float
    target_images: int


def standardise(images: Tensor) -> Tensor:
    """Return images [count, channels, height, width] with mean 0 and deviation near 1, float32.

    The 0.05 in the denominator prevents that the noise of an almost blank image is amplified. The
    backbone was trained only on standardised images, so every user must standardise images, too.
    """
    images = images.float()
    spread, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return (images - mean) / (spread + 0.05)


def pretrain(recipe: Recipe, seed: int) -> ViTForImageClassification:
    """Draw the source set, train a new backbone on it, and return the backbone.

    It takes one or two minutes on one CPU core.
    """
    pixels, targets = glyphs.draw(recipe.images, numpy_generator(seed, "glyph-vit", "source"))
    images, labels = _batch(pixels), torch.from_numpy(targets)
    backbone = build(seed)
    optimizer = torch.optim.AdamW(
        backbone.parameters(), lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay
    )
    batches = len(labels) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.peak_learning_rate,
        total_steps=recipe.epochs * batches,
        pct_start=recipe.warmup,
    )
    generator = torch_generator(seed, "glyph-vit", "order")
    backbone.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=generator)
        # An incomplete last batch is left out; the next epoch shuffles again.
        for rows in order[: batches * recipe.batch_size].view(batches, -1):
            loss = cross_entropy(backbone(pixel_values=images[rows]).logits, labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return backbone.eval()


def build(seed: int) -> ViTForImageClassification:
    """Return the untrained architecture (227,722 parameters, no dropout), initialised by `seed`."""
    config = ViTConfig(
        image_size=glyphs.SIDE,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(digits.NAMES)),
        label2id={name: digit for digit, name in enumerate(digits.NAMES)},
    )
    # transformers initialises from the global generator; fork_rng restores the caller's state.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "glyph-vit", "weights"))
        return ViTForImageClassification(config)


def accuracy(backbone: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Return the share of standardised images [count, 1, 8, 8] with the given ``labels`` [count].

    An image counts if the backbone predicts its label.
    """
    with torch.no_grad():
        guesses = backbone(pixel_values=images).logits.argmax(dim=-1)
    return float((guesses == labels).float().mean())


def measure(folder: Path, seed: int) -> Scores:
    """Return the scores of a saved backbone on 2,000 new drawn digits and on real digits.

    The backbone is not adapted to the real digits.
    """
    backbone = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    drawn, targets = glyphs.draw(2_000, numpy_generator(seed, "glyph-vit", "measure"))
    real = datasets.concatenate_datasets(list(digits.load()))
    written = np.stack([np.asarray(image) for image in real["image"]], dtype=np.float32)
    return Scores(
        source=accuracy(backbone, _batch(drawn), torch.from_numpy(targets)),
        source_images=len(targets),
        target=accuracy(backbone, _batch(written / 255), torch.tensor(real["label"])),
        target_images=len(real),
    )


def save(backbone: ViTForImageClassification, folder: Path) -> None:
    """Write config.json and model.safetensors; weights are stored as float16 to halve the file."""
    backbone.half().save_pretrained(folder)
    backbone.float()
    # The weights are stored in half precision but are to be used in single precision. Loaders take
    # the type from the configuration.
    backbone.config.dtype = torch.float32
    backbone.config.save_pretrained(folder)


def describe(recipe: Recipe, seed: int, scores: Scores) -> str:
    """Return the model card: the backbone, its recipe, its abilities and its limits."""
    return _CARD.format(**vars(recipe), seed=seed, **vars(scores))


def _batch(pixels: NDArray[np.floating[Any]]) -> Tensor:
    return standardise(torch.from_numpy(pixels)[:, None])


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags: [vit, digits, synthetic-data]
---
# glyph-vit

A vision transformer of 227,722 parameters (3 layers, width 96, 4 heads, patches of 2 x 2) that
tells the digits 0 to 9 apart in grey images of 8 x 8 pixels. It has only ever seen digits drawn by
a program. It is the frozen backbone of fedgraft's demonstration, in which several sites adapt it to
real handwriting without moving their images.

## Use

Scale pixels to [0, 1], then standardise every image by itself: `(x - mean) / (std + 0.05)`. Without
this the figures below do not hold.

```python
import torch
from transformers import ViTForImageClassification

model = ViTForImageClassification.from_pretrained("glyph-vit").eval()
x = torch.rand(1, 1, 8, 8)
x = (x - x.mean()) / (x.std() + 0.05)
digit = model(pixel_values=x).logits.argmax(-1).item()
```

## Recipe

`python -m fedgraft.simulations.demo.pretrain OUT_DIR --seed {seed}` made this folder:

- {images:,} drawn digits, {epochs} epochs in batches of {batch_size}, no dropout
- AdamW, weight decay {weight_decay:g}, a one-cycle learning rate that peaks at
  {peak_learning_rate:g} after {warmup:.0%} of the steps
- weights stored as float16

On one machine the command gives the same bytes every time; another processor or package version may
round differently.

## Measured

| images | number | accuracy |
|---|---|---|
| newly drawn, same distribution as in training | {source_images:,} | {source:.3f} |
| real handwriting, zero-shot (scikit-learn's digits) | {target_images:,} | {target:.3f} |

Both rows were measured on the stored float16 weights. No real image entered training, but the ways
of writing and the pen were adjusted by hand after looking at real digits and at what an earlier
backbone got wrong among them. The second row is therefore a little kinder than a first encounter
with unseen handwriting would be.

## Limits

- It is a teaching object. Real digits are read far better by any model trained on some of them.
- Images must be 8 x 8, grey and filled by one digit. Rotation, blur and noise cost accuracy: the
  demonstration's sites adapt it to just these.
- Its drawings are one person's idea of how digits are written, Latin forms only.
- It always answers with a digit, also for an image that shows none.

Licence: Apache-2.0.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Pre-train a backbone, save it, measure the saved backbone, and write the model card."""
    parser = argparse.ArgumentParser(description="Pre-train the glyph-vit backbone.")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where to write the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of floating-point sums depends on the number of threads
    recipe = Recipe()
    save(pretrain(recipe, options.seed), options.folder)
    card = describe(recipe, options.seed, measure(options.folder, options.seed))
    (options.folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
