"""Texts some of whose tokens are hidden, to be guessed from the rest (Devlin et al. 2019, "BERT").

All of a text is read, in stretches that fit the model; none has two texts. What is hidden is drawn
anew each time a stretch is trained on, as Liu et al. 2019 ("RoBERTa") do it, and once and for all
where it is evaluated, so that models are compared on the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_modules import Rows
from fedgraft.client.model.frozen_prefix import Inputs
from fedgraft.client.objectives.labels import IGNORED
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Indices, TextExamples, Wrapped, concatenate
from fedgraft.common.modalities import TextProcessor
from fedgraft.common.modalities.text_arrays import as_examples, digest_of, find_tokens, texts_digest
from fedgraft.common.seeds import numpy_generator

__all__ = ["ClozeExamples", "Hiding", "encode_cloze"]

MASKED, REPLACED = 0.8, 0.1  # of hidden tokens; the rest stay as they are, but must be guessed too


@dataclass(frozen=True)
class Hiding:
    """How tokens are hidden: ``share`` of those that are not ``special``, at least one of a row.

    In their place stands the token ``mask``; ``words`` is the size of the vocabulary.
    """

    share: float
    mask: int
    special: tuple[int, ...]
    words: int

    def count(self, tokens: int) -> int:
        """How many of a row's ``tokens`` are hidden."""
        return min(tokens, max(1, round(self.share * tokens)))


@dataclass(frozen=True)
class ClozeExamples(Wrapped):
    """Stretches of text; of the tokens of ``source.ids`` those are ``hidden``, bool [tokens]."""

    source: TextExamples
    hidden: NDArray[np.bool_]
    hiding: Hiding

    @cached_property
    def _shown(self) -> TextExamples:
        """What is read: the token ``mask`` wherever one is hidden."""
        ids = np.where(self.hidden, np.int32(self.hiding.mask), self.source.ids)
        return replace(self.source, ids=ids)

    @property
    def digest(self) -> str:
        """SHA-256 over all that goes into the model, stretch by stretch."""
        return self._shown.digest

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.source.nbytes + self.source.ids.nbytes + self.hidden.nbytes

    def batch(self, index: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """Those at ``index``, int64 [b, width], as ``TextExamples`` has them."""
        return self._shown.batch(index, width)

    def targets(self, index: Indices, width: int = 0) -> torch.Tensor:
        """The hidden tokens, int64 [b, width], and ``IGNORED`` at all others."""
        shown, ids = (one.batch(index, width)["input_ids"] for one in (self._shown, self.source))
        return ids.where(ids != shown, IGNORED)  # the mask itself, if a text has it, is not hidden

    def subset(self, index: Indices) -> "ClozeExamples":
        """The stretches at ``index``, in that order; the token ids are shared."""
        return replace(self, source=self.source.subset(index))

    def joined(self, others: Sequence["ClozeExamples"]) -> "ClozeExamples":
        """These examples and those of ``others``, in order."""
        every = (self, *others)
        source = concatenate([one.source for one in every])
        assert isinstance(source, TextExamples)  # noqa: S101  # as their parts are
        return replace(self, source=source, hidden=np.concatenate([one.hidden for one in every]))

    def hide_anew(
        self, inputs: Inputs, targets: torch.Tensor, rows: Rows
    ) -> tuple[Inputs, torch.Tensor]:
        """A batch of one site with other tokens hidden, drawn from the site's own generator."""
        original = torch.where(targets == IGNORED, inputs["input_ids"], targets)
        special = torch.isin(original, torch.tensor(self.hiding.special, dtype=torch.int64))
        free = inputs["attention_mask"].bool() & ~special
        ids, wanted = original.clone(), torch.full_like(targets, IGNORED)
        for row in range(rows.count):
            places = free[row].nonzero().flatten()
            order = torch.randperm(len(places), generator=rows.generator)
            chosen = places[order[: self.hiding.count(len(places))]]
            wanted[row, chosen] = original[row, chosen]
            ids[row, chosen] = self._disguised(original[row, chosen], rows.generator)
        return {**inputs, "input_ids": ids}, wanted

    def _disguised(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What stands in the place of hidden ``tokens``: mostly the mask, sometimes any token."""
        lot = torch.rand(len(tokens), generator=generator)
        others = torch.randint(self.hiding.words, tokens.shape, generator=generator)
        replaced = torch.where(lot < MASKED + REPLACED, others, tokens)
        return replaced.masked_fill(lot < MASKED, self.hiding.mask)


def encode_cloze(
    texts: list[str], processor: TextProcessor, job: Job, *, store: Store | None, key: str
) -> ClozeExamples:
    """Stretches of at most ``data.max_length`` tokens, ``data.masked`` of which are hidden.

    Raises:
        BackboneError: its tokenizer has no token for what is hidden.
        DataError: a text becomes no tokens.
    """
    tokenizer, most = processor.tokenizer, job.data.max_length
    if tokenizer.mask_token_id is None:
        raise BackboneError(
            "the backbone's tokenizer has no mask token",
            hint='job.task = "causal-lm" if it continues texts, as GPT-2 does',
        )
    hiding = Hiding(
        share=job.masked_share,
        mask=int(tokenizer.mask_token_id),
        special=tuple(tokenizer.all_special_ids),
        words=len(tokenizer),
    )

    def tokenize(some: Sequence[str]) -> dict[str, list[list[int]]]:
        return processor.tokenize_stretches(some, most)

    digest = digest_of(key, processor.identity, "stretches", most, texts_digest(texts))
    tokens = find_tokens(texts, tokenize, store, digest)
    labels = np.zeros(len(tokens["lengths"]), np.int64)
    source = as_examples(tokens, labels, processor, most, predicted=True)
    return ClozeExamples(source, _hidden(source, hiding, job.job.seed), hiding)


def _hidden(source: TextExamples, hiding: Hiding, seed: int) -> NDArray[np.bool_]:
    """Tokens to hide in evaluation: of a stretch the same ones wherever it is."""
    hidden = np.zeros(len(source.ids), np.bool_)
    free = ~np.isin(source.ids, np.array(hiding.special, np.int32))
    for start, length in zip(source.starts.tolist(), source.lengths.tolist(), strict=True):
        places = start + np.flatnonzero(free[start : start + length])
        draw = numpy_generator(seed, "hidden", source.ids[start : start + length].tobytes().hex())
        hidden[draw.choice(places, hiding.count(len(places)), replace=False)] = True
    return hidden
