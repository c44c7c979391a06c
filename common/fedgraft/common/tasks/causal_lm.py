"""Texts whose own tokens are predicted: every document is cut into blocks, none of which has two.

A block ends where its document ends. Joining documents would fill the last block of each, but a
block would then belong to several documents: what is held out of training would share blocks with
what is not, and a model would attend from one patient's letter to another's.

Blocks of a document overlap by one token: the last of one is what the next begins to read after, so
that every token but a document's first is predicted exactly once, whatever the length of blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Arrays, Keep, Rows, Settings
from fedgraft.common.examples import (
    IGNORED,
    Indices,
    Inputs,
    TextExamples,
    Wrapped,
    concatenate,
)
from fedgraft.common.modalities import Processor
from fedgraft.common.modalities.text import TextProcessor, check_length, find_tokens
from fedgraft.common.tasks.language import TokenTask

__all__ = ["Blocks", "CausalLm", "cut_blocks", "encode_blocks"]


@dataclass(frozen=True)
class Blocks(Wrapped):
    """Blocks of documents, ``source``: every token but the first is predicted from those before."""

    source: TextExamples

    @property
    def digest(self) -> str:
        """That of ``source``."""
        return self.source.digest

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.source.nbytes

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """The blocks at ``index``, as ``TextExamples`` has them."""
        return self.source.batch(index, width)

    def targets(self, index: Indices, width: int = 0) -> NDArray[np.int64]:
        """The token that follows each, int64 [b, width]; ``IGNORED`` where none does."""
        batch = self.batch(index, width)
        ids, mask = batch["input_ids"], batch["attention_mask"].astype(np.bool_)
        targets: NDArray[np.int64] = np.full_like(ids, IGNORED)
        targets[:, :-1] = np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], IGNORED)
        return targets

    def subset(self, index: Indices) -> "Blocks":
        """The blocks at ``index``, in that order; the token ids are shared."""
        return replace(self, source=self.source.subset(index))

    def joined(self, others: "Sequence[Blocks]") -> "Blocks":
        """These blocks and those of ``others``, in order."""
        return replace(self, source=concatenate([one.source for one in (self, *others)]))


class CausalLm(TokenTask):
    """Continue texts token by token, as GPT-2 and Llama do."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    pipeline = "text-generation"
    use = "continue texts"

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> Blocks:
        """Blocks of all documents."""
        check_length(processor, settings.max_length)
        return encode_blocks(rows, processor, settings.max_length, keep)

    def describe_input(self, processor: Processor, settings: Settings) -> str:
        """Texts are cut into blocks."""
        assert isinstance(processor, TextProcessor)  # noqa: S101  # of this task's modality
        return processor.describe(settings, blocks=True)


def encode_blocks(rows: Rows, processor: TextProcessor, max_length: int, keep: Keep) -> Blocks:
    """Blocks of at most ``max_length`` tokens; each text is a document, its end-of-text token last.

    Raises:
        DataError: a text becomes no tokens.
    """

    def tokenize(some: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": processor.tokenize_documents(some)}

    name = (processor.identity, "documents", rows.digest("text"))
    tokens = find_tokens(rows.column("text"), tokenize, keep, name)
    return Blocks(_cut(tokens, max_length, processor))


def _cut(tokens: Arrays, max_length: int, processor: TextProcessor) -> TextExamples:
    starts, lengths = cut_blocks(tokens["lengths"], max_length)
    return TextExamples(
        labels=np.zeros(len(starts), np.int64),
        ids=tokens["input_ids"],
        starts=starts,
        lengths=lengths,
        types=None,
        pad_id=processor.pad_id,
        # Also of tokenizers that pad on the left, for generation: positions must not move.
        pad_left=False,
        longest=max_length,
    )


def cut_blocks(documents: Indices, most: int) -> tuple[Indices, Indices]:
    """Where each block starts and how long it is, both int64 [blocks].

    ``documents`` int64 [n] has the tokens of documents that lie one after the other.
    """
    step = most - 1
    counts = np.maximum(-(-(documents - 1) // step), 1)
    first = np.repeat(np.cumsum(documents) - documents, counts)
    within = step * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    lengths: Indices = np.minimum(np.repeat(documents, counts) - within, most)
    return first + within, lengths
