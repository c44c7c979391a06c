"""Sequence-to-sequence language modelling: read one text and write another, as T5 and BART do.

The decoder reads the target after a start token and without its last token (teacher forcing). Both
texts of a batch are padded to one width. So a pass over several sites, and the dropout of each
site, need only one width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Arrays, Keep, NameParts, Rows, Settings
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import (
    IGNORED,
    Indices,
    Inputs,
    TextExamples,
    concatenate,
)
from fedgraft.common.modalities import Processor
from fedgraft.common.modalities.text import (
    TextProcessor,
    check_length,
    check_string,
    find_tokens,
)
from fedgraft.common.tasks.base import Cell, Reading, Wrapped
from fedgraft.common.tasks.language import TokenTask

__all__ = ["PairedTexts", "Seq2SeqLm"]


@dataclass(frozen=True)
class PairedTexts(Wrapped):
    """Pairs of texts: ``source`` is read; ``target`` is written after the token ``start``."""

    source: TextExamples
    target: TextExamples
    start: int

    @cached_property
    def lengths(self) -> Indices:
        """Return the number of tokens of the longer text of each pair."""
        return np.maximum(self.source.lengths, self.target.lengths)

    @property
    def pad_left(self) -> bool:
        """Return False: padding is after the tokens."""
        return False

    @property
    def digest(self) -> str:
        """Return the SHA-256 over all tokens, example by example."""
        return f"{self.source.digest}{self.target.digest}{self.start}"

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return self.source.nbytes + self.target.nbytes

    @property
    def target_count(self) -> int:
        """Return the number of tokens to write."""
        return int(self.target.lengths.sum())

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return ``input_ids``, ``attention_mask`` and ``decoder_input_ids``, int64 [b, width].

        The decoder attends only to earlier positions, so its padding at the end needs no mask.
        """
        width = width or self.width(index)
        written = self.target.batch(index, width)["input_ids"]
        start = np.full_like(written[:, :1], self.start)
        shifted = np.concatenate([start, written[:, :-1]], 1)
        return {**self.source.batch(index, width), "decoder_input_ids": shifted}

    def targets(self, index: Indices, width: int = 0) -> NDArray[np.int64]:
        """Return the tokens of the target, int64 [b, width], padded with ``IGNORED``."""
        written = self.target.batch(index, width or self.width(index))
        real = written["attention_mask"].astype(np.bool_)
        targets: NDArray[np.int64] = np.where(real, written["input_ids"], IGNORED)
        return targets

    def subset(self, index: Indices) -> "PairedTexts":
        """Return the examples at ``index``, in that order; the token ids are shared."""
        parts = (self.source.subset(index), self.target.subset(index))
        return PairedTexts(*parts, self.start)

    def joined(self, others: Sequence["PairedTexts"]) -> "PairedTexts":
        """Return these examples and the examples of ``others``, in order."""
        every = (self, *others)
        source = concatenate([one.source for one in every])
        target = concatenate([one.target for one in every])
        return PairedTexts(source, target, self.start)


class Seq2SeqLm(TokenTask):
    """Write a text for each text, as T5 and BART do."""

    name = pipeline = "seq2seq-lm"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"
    use = "write a text for each"
    blocks = False
    beside = "target"
    stored: Mapping[str, str] = MappingProxyType({"target": "string"})

    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return the target text."""
        check_string(cell.beside, "target")
        return {"label": 0, "target": cell.beside}

    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the target text."""
        return {"target": row["target"]}

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> PairedTexts:
        """Return one example per row; both texts are cut to ``data.max_length`` tokens.

        Raises:
            BackboneError: the backbone has no start token for its decoder.
            DataError: a text gives no tokens.
        """
        check_length(processor, settings.max_length)
        if processor.decoder_start is None:
            raise BackboneError(
                "the backbone's config.json has no decoder_start_token_id",
                hint=f"{self.name} wants an encoder with a decoder, such as T5 or BART",
            )
        parts = [
            _encoded(rows, column, processor, settings.max_length, keep)
            for column in ("text", "target")
        ]
        return PairedTexts(parts[0], parts[1], processor.decoder_start)

    def blank(self, processor: Processor, settings: Settings) -> Inputs:
        """Return one text, and a target of the same length that the decoder reads."""
        inputs = super().blank(processor, settings)
        return {**inputs, "decoder_input_ids": inputs["input_ids"]}


def _encoded(
    rows: Rows, column: str, processor: TextProcessor, most: int, keep: Keep
) -> TextExamples:
    written = column == "target"

    def tokenize(some: Sequence[str]) -> dict[str, list[list[int]]]:
        return processor.tokenize(some, most, written=written)

    name: NameParts = (processor.identity, f"pairs {column}", most, rows.digest(column))
    tokens: Arrays = find_tokens(rows.column(column), tokenize, keep, name)
    lengths = tokens["lengths"]
    return TextExamples(
        labels=np.zeros(len(lengths), np.int64),
        ids=tokens["input_ids"],
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=None,
        pad_id=processor.pad_id,
        pad_left=False,
        longest=most,
    )
