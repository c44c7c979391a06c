"""Images some of whose patches are hidden, to be painted from the rest (Xie et al. 2022, "SimMIM").

What is hidden is drawn anew each time an image is trained on, and once and for all where it is
evaluated. What counts of a patch is the mean absolute error of its pixels, as the model reads them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.model.batched_modules import Rows
from fedgraft.client.model.frozen_prefix import Inputs
from fedgraft.common.adapters.model import open_processor
from fedgraft.common.backbones.load import read_config
from fedgraft.common.config.job import Job
from fedgraft.common.examples import ImageExamples, Indices, Wrapped, concatenate
from fedgraft.common.layout import Vector
from fedgraft.common.modalities.patches import cut_patches
from fedgraft.common.seeds import numpy_generator

__all__ = ["PatchExamples", "hide_patches"]

UNSEEN = "bool_masked_pos"  # as models of transformers call what is hidden


@dataclass(frozen=True)
class PatchExamples(Wrapped):
    """Images in patches of ``side`` x ``side`` pixels; ``hidden`` bool [n, patches]."""

    source: ImageExamples
    hidden: NDArray[np.bool_]
    side: int

    @property
    def digest(self) -> str:
        """SHA-256 over pixels and what of them is hidden."""
        hidden = hashlib.sha256(self.hidden.tobytes()).hexdigest()
        return f"{self.source.digest}{hidden}{self.side}"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.source.nbytes + self.hidden.nbytes

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """``pixel_values`` and ``bool_masked_pos``, bool [b, patches]."""
        hidden = torch.from_numpy(self.hidden[index])
        return {**self.source.batch(index), UNSEEN: hidden}

    def targets(self, index: Indices, width: int = 0) -> torch.Tensor:
        """Pixels of the hidden patches, float32 [b, patches, values], NaN in all others."""
        batch = self.batch(index)
        return _wanted(cut_patches(batch["pixel_values"], self.side), batch[UNSEEN])

    def subset(self, index: Indices) -> "PatchExamples":
        """The images at ``index``, in that order; pixels are shared."""
        return replace(self, source=self.source.subset(index), hidden=self.hidden[index])

    def joined(self, others: Sequence["PatchExamples"]) -> "PatchExamples":
        """These examples and those of ``others``, in order."""
        every = (self, *others)
        images = concatenate([one.source for one in every])
        assert isinstance(images, ImageExamples)  # noqa: S101  # as their parts are
        return replace(self, source=images, hidden=np.concatenate([one.hidden for one in every]))

    def hide_anew(
        self, inputs: Inputs, targets: torch.Tensor, rows: Rows
    ) -> tuple[Inputs, torch.Tensor]:
        """A batch of one site with other patches hidden, drawn from the site's own generator."""
        hidden = inputs[UNSEEN].clone()
        for row in range(rows.count):  # as many as before, elsewhere
            order = torch.randperm(hidden.shape[1], generator=rows.generator)
            hidden[row] = inputs[UNSEEN][row][order]
        wanted = _wanted(cut_patches(inputs["pixel_values"], self.side), hidden)
        return {**inputs, UNSEEN: hidden}, wanted


def hide_patches(images: ImageExamples, job: Job) -> PatchExamples:
    """``images`` with ``data.masked`` of their patches hidden, of an image the same ones anywhere.

    Raises:
        BackboneError: transformers does not know the backbone.
    """
    side = int(read_config(open_processor(job)[0]).patch_size)
    height, width = images.values.shape[2:]
    patches = (height // side) * (width // side)
    count = min(patches, max(1, round(job.masked_share * patches)))
    hidden = np.zeros((len(images), patches), np.bool_)
    for at, row in enumerate(images.rows):
        pixels: Vector = images.values[row]
        seen = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        draw = numpy_generator(job.job.seed, "hidden", seen)
        hidden[at, draw.permutation(patches)[:count]] = True
    return PatchExamples(images, hidden, side)


def _wanted(patches: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return patches.masked_fill(~hidden[..., None], torch.nan)
