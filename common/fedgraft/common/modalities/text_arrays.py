"""Texts as token ids: tokenised once, and found again by a hash over all that decides them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.data.cache import Arrays, Store
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import Indices, TextExamples
from fedgraft.common.modalities import TextProcessor

__all__ = [
    "as_examples",
    "check_length",
    "digest_of",
    "encode_texts",
    "find_tokens",
    "texts_digest",
]

BATCH = 1000  # texts tokenised at once
KINDS = {"input_ids": np.int32, "token_type_ids": np.int8}

Tokenize = Callable[[Sequence[str]], Mapping[str, list[list[int]]]]


def check_length(processor: TextProcessor, max_length: int) -> None:
    """Check that the backbone reads examples of ``max_length`` tokens.

    Raises:
        BackboneError: it does not.
    """
    if processor.limit is not None and max_length > processor.limit:
        raise BackboneError(
            f"data.max_length = {max_length}, but the backbone reads {processor.limit} tokens",
            hint=f"--set data.max_length={processor.limit}",
        )


def encode_texts(
    texts: list[str],
    labels: Indices,
    processor: TextProcessor,
    max_length: int,
    *,
    store: Store | None,
    key: str,
) -> TextExamples:
    """One example a text, cut to ``max_length`` tokens, with ``labels`` int64 [texts].

    Raises:
        DataError: a text becomes no tokens.
    """
    digest = digest_of(key, processor.identity, max_length, texts_digest(texts))
    tokens = find_tokens(texts, lambda some: processor.tokenize(some, max_length), store, digest)
    return as_examples(tokens, labels, processor, max_length)


def as_examples(
    tokens: Arrays,
    labels: Indices,
    processor: TextProcessor,
    max_length: int,
    *,
    predicted: bool = False,
) -> TextExamples:
    """What ``find_tokens`` found, none longer than ``max_length``, as examples with ``labels``."""
    lengths = tokens["lengths"]
    return TextExamples(
        labels=labels,
        ids=tokens["input_ids"],
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=tokens.get("token_type_ids"),
        pad_id=processor.pad_id,
        pad_left=processor.pad_left,
        longest=max_length,
        predicted=predicted,
    )


def find_tokens(
    texts: Sequence[str], tokenize: Tokenize, store: Store | None, digest: str
) -> Arrays:
    """``tokenize`` of all texts one after the other, and how many tokens each has (``lengths``).

    What ``store`` has under ``digest`` is taken from there.

    Raises:
        DataError: a text becomes no tokens.
    """
    tokens = store.files.load(digest) if store else None
    if tokens is None:
        tokens = _tokenise(texts, tokenize)
        if store:
            store.files.save(digest, tokens)
    lengths = tokens["lengths"]
    if not lengths.all():
        raise DataError(
            f"text {int(np.argmin(lengths)) + 1} of {len(lengths)} becomes no tokens at all",
            hint="remove the row: the tokenizer knows none of its characters",
        )
    return tokens


def _tokenise(texts: Sequence[str], tokenize: Tokenize) -> Arrays:
    given = tokenize(["a"])
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in KINDS if name in given}
    lengths: list[int] = []
    for at in range(0, len(texts), BATCH):
        encoded = tokenize(texts[at : at + BATCH])
        lengths += [len(ids) for ids in encoded["input_ids"]]
        for name, parts in found.items():
            parts.append(np.fromiter(chain.from_iterable(encoded[name]), KINDS[name]))
    none = {name: np.empty(0, KINDS[name]) for name in found}
    flat = {name: np.concatenate([none[name], *parts]) for name, parts in found.items()}
    return Arrays({**flat, "lengths": np.array(lengths, np.int64)})


def texts_digest(texts: Sequence[str]) -> str:
    """SHA-256 of all texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def digest_of(*parts: str | int) -> str:
    """The name of a file in a store, made of ``parts``."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:32]
