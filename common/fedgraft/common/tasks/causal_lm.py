"""Causal language modelling: predict the tokens of texts, which are cut into blocks.

No block contains parts of two documents; a block ends where its document ends. Joined documents
would fill the last block of each document, but a block would then belong to several documents.
Held-out documents would share blocks with training documents, and a model would attend from one
patient's letter to another patient's letter.

Blocks of a document overlap by one token: the last token of one block is the first token of the
next block. So every token except a document's first token is predicted exactly once, for any block
length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Keep, Rows, Settings
from fedgraft.common.examples import (
    IGNORED,
    Indices,
    Inputs,
    TextExamples,
    concatenate,
)
from fedgraft.common.modalities.text import TextProcessor, check_length, find_tokens
from fedgraft.common.tasks.base import TextBlocks
from fedgraft.common.tasks.language import TokenTask

__all__ = ["Blocks", "CausalLm", "cut_blocks", "encode_blocks"]


@dataclass(frozen=True)
class Blocks(TextBlocks):
    """Blocks of documents (``source``); the earlier tokens of a block predict each next token."""

    @property
    def digest(self) -> str:
        """Return the digest of ``source``."""
        return self.source.digest

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return self.source.nbytes

    @property
    def target_count(self) -> int:
        """Return the number of tokens that follow another token of their block."""
        return int(np.maximum(self.source.lengths - 1, 0).sum())

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return the blocks at ``index`` in the form of ``TextExamples``."""
        return self.source.batch(index, width)

    def targets(self, index: Indices, width: int = 0) -> NDArray[np.int64]:
        """Return the next token of each position, int64 [b, width]; ``IGNORED`` if none follows."""
        batch = self.batch(index, width)
        ids, mask = batch["input_ids"], batch["attention_mask"].astype(np.bool_)
        targets: NDArray[np.int64] = np.full_like(ids, IGNORED)
        targets[:, :-1] = np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], IGNORED)
        return targets

    def subset(self, index: Indices) -> "Blocks":
        """Return the blocks at ``index``, in that order; the token ids are shared."""
        return replace(self, source=self.source.subset(index), of=self.of[index])

    def joined(self, others: "Sequence[Blocks]") -> "Blocks":
        """Return these blocks and the blocks of ``others``, in order."""
        source = concatenate([one.source for one in (self, *others)])
        return replace(self, source=source, of=self.joined_documents(others))


class CausalLm(TokenTask):
    """Continue texts token by token, as GPT-2 and Llama do."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    pipeline = "text-generation"
    use = "continue texts"

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> Blocks:
        """Return the blocks of all documents."""
        check_length(processor, settings.max_length)
        return encode_blocks(rows, processor, settings.max_length, keep)


def encode_blocks(rows: Rows, processor: TextProcessor, max_length: int, keep: Keep) -> Blocks:
    """Return blocks of at most ``max_length`` tokens.

    Each text is a document; its last token is the end-of-text token.

    Raises:
        DataError: a text gives no tokens.
    """

    def tokenize(some: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": processor.tokenize_documents(some)}

    name = (processor.identity, "documents", rows.digest("text"))
    tokens = find_tokens(rows.column("text"), tokenize, keep, name)
    starts, lengths, of = cut_blocks(tokens["lengths"], max_length)
    source = TextExamples(
        labels=np.zeros(len(starts), np.int64),
        ids=tokens["input_ids"],
        starts=starts,
        lengths=lengths,
        types=None,
        pad_id=processor.pad_id,
        # False even if the tokenizer pads on the left (for generation): positions must not move.
        pad_left=False,
        longest=max_length,
    )
    return Blocks(source, of)


def cut_blocks(documents: Indices, most: int) -> tuple[Indices, Indices, Indices]:
    """Return the start, the length and the document of each block, all int64 [blocks].

    ``documents``, int64 [n], are the numbers of tokens of documents that are stored one after the
    other.
    """
    step = most - 1
    counts = np.maximum(-(-(documents - 1) // step), 1)
    first = np.repeat(np.cumsum(documents) - documents, counts)
    within = step * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    lengths: Indices = np.minimum(np.repeat(documents, counts) - within, most)
    return first + within, lengths, np.repeat(np.arange(len(documents)), counts)
