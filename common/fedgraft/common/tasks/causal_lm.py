"""Texts whose own tokens are predicted: every document is cut into blocks, none of which has two.

A block ends where its document ends. Joining documents would fill the last block of each, but a
block would then belong to several documents: what is held out of training would share blocks with
what is not, and a model would attend from one patient's letter to another's.

Blocks of a document overlap by one token: the last of one is what the next begins to read after, so
that every token but a document's first is predicted exactly once, whatever the length of blocks.
"""

from collections.abc import Sequence

import numpy as np

from fedgraft.client.data.cache import Store
from fedgraft.common.examples import Indices, TextExamples
from fedgraft.common.modalities import TextProcessor
from fedgraft.common.modalities.text_arrays import digest_of, find_tokens, texts_digest

__all__ = ["cut_blocks", "encode_blocks"]


def encode_blocks(
    texts: list[str], processor: TextProcessor, max_length: int, *, store: Store | None, key: str
) -> TextExamples:
    """Blocks of at most ``max_length`` tokens; each text is a document, its end-of-text token last.

    Raises:
        DataError: a text becomes no tokens.
    """

    def tokenize(some: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": processor.tokenize_documents(some)}

    digest = digest_of(key, processor.identity, "documents", texts_digest(texts))
    tokens = find_tokens(texts, tokenize, store, digest)
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
        predicted=True,
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
