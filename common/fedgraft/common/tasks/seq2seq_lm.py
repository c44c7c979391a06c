"""Two texts an example: one to read, and one to write token by token, as T5 and BART do it.

The decoder reads what it should have written so far: the target behind a start token, without its
last token (teacher forcing). Both texts of a batch are padded to one width, so that a pass over
several sites and the dropout of each need to know only one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedgraft.client.objectives.labels import IGNORED
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Indices, TextExamples, Wrapped, concatenate
from fedgraft.common.modalities import TextProcessor
from fedgraft.common.modalities.text_arrays import find_tokens

__all__ = ["PairedExamples", "encode_pairs"]


@dataclass(frozen=True)
class PairedExamples(Wrapped):
    """``source`` is read, ``target`` is to be written after the token ``start``."""

    source: TextExamples
    target: TextExamples
    start: int

    @cached_property
    def lengths(self) -> Indices:
        """Tokens of the longer text of each."""
        return np.maximum(self.source.lengths, self.target.lengths)

    @property
    def pad_left(self) -> bool:
        """Padding stands behind the tokens."""
        return False

    @property
    def digest(self) -> str:
        """SHA-256 over all tokens, example by example."""
        return f"{self.source.digest}{self.target.digest}{self.start}"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.source.nbytes + self.target.nbytes

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``decoder_input_ids``, int64 [b, width].

        The decoder attends to what comes before alone: its padding, at the end, needs no mask.
        """
        width = width or self.width(index)
        written = self.target.batch(index, width)["input_ids"]
        shifted = torch.cat([torch.full_like(written[:, :1], self.start), written[:, :-1]], 1)
        return {**self.source.batch(index, width), "decoder_input_ids": shifted}

    def targets(self, index: Indices, width: int = 0) -> torch.Tensor:
        """The tokens of the target, int64 [b, width], padded with ``IGNORED``."""
        written = self.target.batch(index, width or self.width(index))
        return written["input_ids"].where(written["attention_mask"].bool(), IGNORED)

    def subset(self, index: Indices) -> "PairedExamples":
        """The examples at ``index``, in that order; the token ids are shared."""
        parts = (self.source.subset(index), self.target.subset(index))
        return PairedExamples(*parts, self.start)

    def joined(self, others: Sequence["PairedExamples"]) -> "PairedExamples":
        """These examples and those of ``others``, in order."""
        every = (self, *others)
        source = concatenate([one.source for one in every])
        target = concatenate([one.target for one in every])
        assert isinstance(source, TextExamples)  # noqa: S101  # as their parts are
        assert isinstance(target, TextExamples)  # noqa: S101
        return PairedExamples(source, target, self.start)


def encode_pairs(
    texts: list[str], targets: list[str], processor: TextProcessor, job: Job
) -> PairedExamples:
    """One example a row, both of its texts cut to ``data.max_length`` tokens.

    Raises:
        BackboneError: it does not say what its decoder starts with.
        DataError: a text becomes no tokens.
    """
    if processor.decoder_start is None:
        raise BackboneError(
            "the backbone's config.json has no decoder_start_token_id",
            hint=f"{job.job.task} wants an encoder with a decoder, such as T5 or BART",
        )
    most = job.data.max_length
    return PairedExamples(
        _encoded(texts, processor, most, written=False),
        _encoded(targets, processor, most, written=True),
        processor.decoder_start,
    )


def _encoded(
    texts: list[str], processor: TextProcessor, most: int, *, written: bool
) -> TextExamples:
    tokens = find_tokens(
        texts, lambda some: processor.tokenize(some, most, written=written), None, ""
    )
    lengths = tokens["lengths"]
    return TextExamples(
        labels=np.zeros(len(texts), np.int64),
        ids=tokens["input_ids"],
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=None,
        pad_id=processor.pad_id,
        pad_left=False,
        longest=most,
    )
