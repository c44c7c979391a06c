"""Augmentation: vary training examples each time they are used, with the site's own generator.

kornia varies images. It draws from PyTorch's default generator, which is therefore seeded from the
site's generator for that moment. Only a site's real rows are varied, so the site draws the same
numbers whichever sites share its pass. Texts and recordings are varied here, with one line of code
for each kind of change. The existing libraries for them draw from generators of their own kind, or
are no longer maintained (nlpaug).
"""

from collections.abc import Callable
from typing import Any

import torch

from fedgraft.client.data.batches import Inputs
from fedgraft.client.model.randomness import SiteRows
from fedgraft.common.config.augmentation import (
    AudioAugmentation,
    Augmentation,
    ImageAugmentation,
    TextAugmentation,
)
from fedgraft.common.errors import InputError

__all__ = ["Vary", "open_augmentation"]

Vary = Callable[[Inputs, torch.Tensor, SiteRows], tuple[Inputs, torch.Tensor]]


def open_augmentation(settings: Augmentation) -> Vary:
    """Return the function that varies the inputs of one site; the targets stay the same.

    The first ``SiteRows.count`` rows of a batch are real; only these are varied.

    Raises:
        InputError: images are to be varied, and kornia is not installed.
    """
    images = _open_images(settings.image) if settings.image is not None else None

    def vary(inputs: Inputs, targets: torch.Tensor, rows: SiteRows) -> tuple[Inputs, torch.Tensor]:
        return varied(inputs, rows), targets

    def varied(inputs: Inputs, rows: SiteRows) -> Inputs:
        if not rows.count:  # other sites in the pass have more rows: nothing is drawn here
            return inputs
        if images is not None and "pixel_values" in inputs:
            return {**inputs, "pixel_values": images(inputs["pixel_values"], rows)}
        if settings.text is not None and "input_ids" in inputs:
            return _vary_texts(settings.text, inputs, rows)
        if settings.audio is not None:
            return _vary_audio(settings.audio, inputs, rows)
        return inputs

    return vary


def _open_images(settings: ImageAugmentation) -> Callable[[torch.Tensor, SiteRows], torch.Tensor]:
    try:
        import kornia.augmentation as kornia
    except ImportError:
        raise InputError(
            "training.augmentation.image needs kornia", hint='pip install "fedgraft[augment]"'
        ) from None
    steps: list[Any] = []
    if settings.flip:
        steps.append(kornia.RandomHorizontalFlip(p=0.5))
    if settings.shift or settings.rotate or settings.zoom:
        zoom = (1 - settings.zoom, 1 + settings.zoom)
        shift = (settings.shift, settings.shift)
        steps.append(kornia.RandomAffine(settings.rotate, shift, zoom, p=1.0))
    if settings.erase:
        steps.append(kornia.RandomErasing(scale=(0.02, 0.2), p=settings.erase))
    if settings.noise:
        steps.append(kornia.RandomGaussianNoise(std=settings.noise, p=1.0))

    def vary(pixels: torch.Tensor, rows: SiteRows) -> torch.Tensor:
        seed = int(torch.randint(2**62, (), generator=rows.generator))
        varied = pixels[: rows.count]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            for step in steps:
                varied = step(varied)
        return torch.cat([varied.to(pixels.dtype), pixels[rows.count :]])

    return vary


def _vary_texts(settings: TextAugmentation, inputs: Inputs, rows: SiteRows) -> Inputs:
    """Vary token ids and mask of each text; its first and its last token stay unchanged."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    for row in range(rows.count):
        places = mask[row].nonzero().flatten()[1:-1]
        if settings.swap and len(places) > 1:
            left, right = places[0 : len(places) - 1 : 2], places[1::2]
            chosen = torch.rand(len(left), generator=rows.generator) < settings.swap
            one, other = left[chosen], right[chosen]
            ids[row, one], ids[row, other] = ids[row, other].clone(), ids[row, one].clone()
        if settings.hide:
            hidden = torch.rand(len(places), generator=rows.generator) < settings.hide
            mask[row, places[hidden]] = 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def _vary_audio(settings: AudioAugmentation, inputs: Inputs, rows: SiteRows) -> Inputs:
    """Vary samples [b, samples] or a spectrogram [b, bands, frames]; padding may move too."""
    name = "input_values" if "input_values" in inputs else "input_features"
    sound, draw = inputs[name].clone(), rows.generator
    for row in range(rows.count):
        own = sound[row]
        if settings.gain and own.ndim == 1:
            decibels = settings.gain * (2 * torch.rand((), generator=draw) - 1)
            own = own * 10 ** (decibels / 20)
        if settings.delay:
            most = int(settings.delay * own.shape[-1])
            own = own.roll(int(torch.randint(-most, most + 1, (), generator=draw)), dims=-1)
        if settings.noise:
            own = own + settings.noise * torch.randn(own.shape, generator=draw)
        sound[row] = own
    return {**inputs, name: sound}
