"""Masked image modelling: reconstruct hidden patches of an image (Xie et al. 2022, "SimMIM").

The hidden patches are drawn again each time an image is used in training; for evaluation they are
drawn once. The loss of a patch is the mean absolute error of its pixels, as the model reads them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Draws, Keep, Rows, Settings
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Examples, ImageExamples, Indices, Inputs, concatenate
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.part_evaluation import PATCHES, PartMeasures
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.tasks.base import Cell, Corrupt, Differences, Reading, Task, Wrapped
from fedgraft.common.tasks.refusals import without_classes

__all__ = ["MaskedImageModeling", "MaskedPatches", "cut_patches", "hide_patches"]

MOST = 4096  # most patches of one image
PAINTERS = ("deit", "vit")
"""Kinds of transformers models whose input patches and output patches have one size."""
UNSEEN = "bool_masked_pos"  # the input name in transformers models


@dataclass(frozen=True)
class MaskedPatches(Wrapped):
    """Images in patches of ``side`` x ``side`` pixels; ``hidden`` is bool [n, patches]."""

    source: ImageExamples
    hidden: NDArray[np.bool_]
    side: int

    @property
    def digest(self) -> str:
        """Return the SHA-256 over pixels and hidden patches, with ``side``."""
        hidden = hashlib.sha256(self.hidden.tobytes()).hexdigest()
        return f"{self.source.digest}{hidden}{self.side}"

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return self.source.nbytes + self.hidden.nbytes

    @property
    def target_count(self) -> int:
        """Return the number of hidden patches: every draw hides the same number of an image."""
        return int(self.hidden.sum())

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return ``pixel_values`` and ``bool_masked_pos``, bool [b, patches]."""
        return {**self.source.batch(index), UNSEEN: self.hidden[index]}

    def targets(self, index: Indices, width: int = 0) -> NDArray[np.float32]:
        """Return the hidden patches, float32 [b, patches, values]; all other patches are NaN."""
        batch = self.batch(index)
        return _wanted(cut_patches(batch["pixel_values"], self.side), batch[UNSEEN])

    def subset(self, index: Indices) -> "MaskedPatches":
        """Return the images at ``index``, in that order; pixels are shared."""
        return replace(self, source=self.source.subset(index), hidden=self.hidden[index])

    def joined(self, others: Sequence["MaskedPatches"]) -> "MaskedPatches":
        """Return these examples and the examples of ``others``, in order."""
        every = (self, *others)
        images = concatenate([one.source for one in every])
        return replace(self, source=images, hidden=np.concatenate([one.hidden for one in every]))

    def corrupt(
        self, inputs: Inputs, targets: NDArray[np.float32], draws: Draws
    ) -> tuple[Inputs, NDArray[np.float32]]:
        """Return a batch of one site with other hidden patches, drawn from the site's generator."""
        hidden = inputs[UNSEEN].copy()
        for row in range(draws.count):  # the same number, other patches
            hidden[row] = inputs[UNSEEN][row][draws.permutation(hidden.shape[1])]
        wanted = _wanted(cut_patches(inputs["pixel_values"], self.side), hidden)
        return {**inputs, UNSEEN: hidden}, wanted


class MaskedImageModeling(Task):
    """Reconstruct hidden patches of images, as SimMIM pre-trains vision transformers."""

    name = pipeline = "masked-image-modeling"
    auto_class = "AutoModelForMaskedImageModeling"
    modality = MODALITIES["image"]
    target = "patches"
    head_alone = False
    hidden_share = 0.6
    metrics = (PATCHES.metric, Metric("accuracy", "close patches", short="right"))
    card_metrics = (Metric("accuracy", "accuracy"),)
    intervals = (
        "Reconstruction error and close patches have bootstrap intervals over images, each redrawn "
        "with all of its patches."
    )
    verdicts = (
        '"Helped" and "hurt" need both a paired permutation test over images below 5 % and a 95 % '
        "bootstrap interval of the difference in error a pixel that excludes zero. Both models "
        "read the same images."
    )
    differences = Differences(
        "error of a pixel, on the site's own test images: below 0 the federated model is better. "
        "Below it its 95 % interval, by bootstrap over images",
        ("Loss", "Permutation p"),
        points=False,
    )
    use = "paint hidden parts of an image"
    refuses = without_classes(
        "patches",
        more={
            "label_smoothing": (
                "{task} has no labels to smooth",
                "leave training.label_smoothing out",
            )
        },
    )

    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return label 0: the patches to predict are in the image itself."""
        return {"label": 0}

    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return an empty dictionary."""
        return {}

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> MaskedPatches:
        """Return images; the share ``data.masked`` of their patches is hidden."""
        labels = np.zeros(len(rows), np.int64)
        images: Any = self.modality.encode(rows, labels, processor, settings, keep)
        return hide_patches(images, processor.patch, settings)

    def blank(self, processor: Any, settings: Settings) -> Inputs:
        """Return one black image, with the usual number of patches hidden."""
        inputs = processor.blank(settings)
        patches, count = _numbers(inputs["pixel_values"].shape, processor.patch, settings)
        return {**inputs, UNSEEN: np.arange(patches)[None] < count}

    def corruption(self, examples: Examples) -> Corrupt:
        """Return a function that hides other patches in each training step."""
        assert isinstance(examples, MaskedPatches)  # noqa: S101  # the type that encode returns
        return examples.corrupt

    def measures(self, settings: Settings) -> PartMeasures:
        """Return the measures: the number of close hidden patches and of all hidden patches."""
        return PartMeasures(MOST, PATCHES)

    def model_options(
        self, config: Mapping[str, Any], labels: Sequence[str], source: str
    ) -> dict[str, Any]:
        """Return the stride with which a model reconstructs whole images.

        Raises:
            BackboneError: the model is of a kind that was not tested.
        """
        kind = config.get("model_type")
        if kind not in PAINTERS or not isinstance(config.get("patch_size"), int):
            raise BackboneError(
                f"{source} is of the kind {kind!r}, whose patches cannot be hidden here",
                hint=f"a model of a kind that can: {', '.join(PAINTERS)}",
            )
        return {"encoder_stride": config["patch_size"]}


def hide_patches(images: ImageExamples, side: int, settings: Settings) -> MaskedPatches:
    """Return ``images`` with a share of their patches hidden.

    ``side`` is the side of a patch in pixels. The hidden patches depend only on the image and the
    seed, so they are the same at every site.
    """
    patches, count = _numbers(images.values.shape, side, settings)
    hidden = np.zeros((len(images), patches), np.bool_)
    for at, row in enumerate(images.rows):
        pixels: NDArray[np.float32] = images.values[row]
        seen = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        draw = numpy_generator(settings.seed, "hidden", seen)
        hidden[at, draw.permutation(patches)[:count]] = True
    return MaskedPatches(images, hidden, side)


def _numbers(shape: Sequence[int], side: int, settings: Settings) -> tuple[int, int]:
    """Return the number of patches of an image of [b, c, h, w], and how many are hidden."""
    height, width = shape[2:]
    patches = (height // side) * (width // side)
    share = settings.masked or MaskedImageModeling.hidden_share
    return patches, min(patches, max(1, round(share * patches)))


def cut_patches(pixels: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return images [b, c, h, w] as patches, row by row: [b, patches, c x side x side].

    Pixels beyond the last whole patch are cut off.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    whole = pixels[:, :, : rows * side, : columns * side]
    split = whole.reshape(count, channels, rows, side, columns, side)
    patches: NDArray[np.float32] = split.transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, rows * columns, channels * side * side)


def _wanted(patches: NDArray[np.float32], hidden: NDArray[np.bool_]) -> NDArray[np.float32]:
    wanted: NDArray[np.float32] = np.where(hidden[..., None], patches, np.float32(np.nan))
    return wanted
