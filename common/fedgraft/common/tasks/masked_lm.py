"""Masked language modelling: predict hidden tokens of a text (Devlin et al. 2019, "BERT").

All tokens of a text are read, in blocks that fit the model; no block contains two texts. The hidden
tokens are drawn again each time a block is used in training, as in Liu et al. 2019 ("RoBERTa"). For
evaluation they are drawn once, so that all models are compared on the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Draws, Keep, Rows, Settings
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import (
    IGNORED,
    Examples,
    Indices,
    Inputs,
    TextExamples,
    concatenate,
)
from fedgraft.common.modalities.text import (
    as_examples,
    check_length,
    find_tokens,
)
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.tasks.base import Corrupt, TextBlocks, count_marked
from fedgraft.common.tasks.language import PERPLEXITY, TokenTask

__all__ = ["Hiding", "MaskedLm", "MaskedTokens"]

MASKED, REPLACED = 0.8, 0.1  # shares of hidden tokens; the rest stay visible but are also predicted


@dataclass(frozen=True)
class Hiding:
    """The settings for hiding tokens.

    ``share`` is the hidden share of the tokens that are not ``special``, at least one token per
    block. The token ``mask`` replaces a hidden token; ``words`` is the size of the vocabulary.
    """

    share: float
    mask: int
    special: tuple[int, ...]
    words: int

    def count(self, tokens: int) -> int:
        """Return the number of tokens to hide among ``tokens`` tokens of a block."""
        return min(tokens, max(1, round(self.share * tokens)))


@dataclass(frozen=True)
class MaskedTokens(TextBlocks):
    """Blocks of text; ``hidden``, bool [tokens], marks the hidden tokens in ``source.ids``."""

    hidden: NDArray[np.bool_]
    hiding: Hiding

    @cached_property
    def _shown(self) -> TextExamples:
        """Return the model's input: the token ``mask`` replaces each hidden token."""
        ids = np.where(self.hidden, np.int32(self.hiding.mask), self.source.ids)
        return replace(self.source, ids=ids)

    @property
    def digest(self) -> str:
        """Return the SHA-256 over all inputs of the model, block by block."""
        return self._shown.digest

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return self.source.nbytes + self.source.ids.nbytes + self.hidden.nbytes

    @property
    def target_count(self) -> int:
        """Return the number of hidden tokens: every draw hides the same number of a block."""
        return count_marked(self.hidden, self.source)

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return the blocks at ``index``, int64 [b, width], in the form of ``TextExamples``."""
        return self._shown.batch(index, width)

    def targets(self, index: Indices, width: int = 0) -> NDArray[np.int64]:
        """Return the hidden tokens, int64 [b, width], and ``IGNORED`` at all other positions."""
        shown, ids = (one.batch(index, width)["input_ids"] for one in (self._shown, self.source))
        # A mask token that the text itself contains does not count as hidden.
        hidden: NDArray[np.int64] = np.where(ids != shown, ids, IGNORED)
        return hidden

    def subset(self, index: Indices) -> "MaskedTokens":
        """Return the blocks at ``index``, in that order; the token ids are shared."""
        return replace(self, source=self.source.subset(index), of=self.of[index])

    def joined(self, others: Sequence["MaskedTokens"]) -> "MaskedTokens":
        """Return these examples and the examples of ``others``, in order."""
        every = (self, *others)
        source = concatenate([one.source for one in every])
        hidden, of = np.concatenate([one.hidden for one in every]), self.joined_documents(others)
        return replace(self, source=source, of=of, hidden=hidden)

    def corrupt(
        self, inputs: Inputs, targets: NDArray[np.int64], draws: Draws
    ) -> tuple[Inputs, NDArray[np.int64]]:
        """Return a batch of one site with other hidden tokens, drawn from the site's generator."""
        original = np.where(targets == IGNORED, inputs["input_ids"], targets)
        special = np.isin(original, np.array(self.hiding.special, np.int64))
        free = inputs["attention_mask"].astype(np.bool_) & ~special
        ids, wanted = original.copy(), np.full_like(targets, IGNORED)
        for row in range(draws.count):
            places = np.flatnonzero(free[row])
            order = draws.permutation(len(places))
            chosen = places[order[: self.hiding.count(len(places))]]
            wanted[row, chosen] = original[row, chosen]
            ids[row, chosen] = self._disguised(original[row, chosen], draws)
        return {**inputs, "input_ids": ids}, wanted

    def _disguised(self, tokens: NDArray[np.int64], draws: Draws) -> NDArray[np.int64]:
        """Return the replacements of hidden ``tokens``: mostly the mask, sometimes any token.

        A share of ``tokens`` stays unchanged.
        """
        lot = draws.uniform(len(tokens))
        others = draws.integers(self.hiding.words, len(tokens))
        replaced = np.where(lot < MASKED + REPLACED, others, tokens)
        disguised: NDArray[np.int64] = np.where(lot < MASKED, self.hiding.mask, replaced)
        return disguised


class MaskedLm(TokenTask):
    """Predict hidden tokens from the rest of a text, as in the pre-training of BERT."""

    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    use = "fill gaps in texts"
    card_note = f"Accuracy is of hidden tokens. {PERPLEXITY}"
    hidden_share = 0.15
    reads_types = True

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> MaskedTokens:
        """Return blocks of at most ``data.max_length`` tokens; the share ``data.masked`` is hidden.

        Raises:
            BackboneError: the tokenizer has no mask token.
            DataError: a text gives no tokens.
        """
        tokenizer, most = processor.tokenizer, settings.max_length
        check_length(processor, most)
        if tokenizer.mask_token_id is None:
            raise BackboneError(
                "the backbone's tokenizer has no mask token",
                hint='job.task = "causal-lm" if it continues texts, as GPT-2 does',
            )
        hiding = Hiding(
            share=settings.masked or self.hidden_share,
            mask=int(tokenizer.mask_token_id),
            special=tuple(tokenizer.all_special_ids),
            words=len(tokenizer),
        )

        def tokenize(some: Sequence[str]) -> dict[str, list[list[int]]]:
            stretches: dict[str, list[list[int]]] = processor.tokenize_stretches(some, most)
            return stretches

        name = (processor.identity, "stretches of texts", most, rows.digest("text"))
        tokens = find_tokens(rows.column("text"), tokenize, keep, name)
        labels = np.zeros(len(tokens["lengths"]), np.int64)
        source = as_examples(tokens, labels, processor, most)
        of = np.cumsum(tokens["first"]) - 1
        return MaskedTokens(source, of, _hidden(source, hiding, settings.seed), hiding)

    def corruption(self, examples: Examples) -> Corrupt:
        """Return a function that hides other tokens in each training step."""
        assert isinstance(examples, MaskedTokens)  # noqa: S101  # the type that encode returns
        return examples.corrupt


def _hidden(source: TextExamples, hiding: Hiding, seed: int) -> NDArray[np.bool_]:
    """Return the tokens to hide in evaluation; equal blocks have the same hidden tokens."""
    hidden = np.zeros(len(source.ids), np.bool_)
    free = ~np.isin(source.ids, np.array(hiding.special, np.int32))
    for start, length in zip(source.starts.tolist(), source.lengths.tolist(), strict=True):
        places = start + np.flatnonzero(free[start : start + length])
        draw = numpy_generator(seed, "hidden", source.ids[start : start + length].tobytes().hex())
        hidden[draw.choice(places, hiding.count(len(places)), replace=False)] = True
    return hidden
