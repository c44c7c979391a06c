"""Texts as token ids: the backbone's tokenizer, and rows that are tokenised once and kept."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Arrays, Keep, NameParts, Rows, Settings
from fedgraft.common.errors import BackboneError, DataError, first_line
from fedgraft.common.examples import Indices, Inputs, TextExamples
from fedgraft.common.modalities.base import Modality

__all__ = [
    "Text",
    "TextProcessor",
    "as_examples",
    "check_length",
    "check_string",
    "find_tokens",
    "load_text",
]

BATCH = 1000  # texts tokenised at once
KINDS = {"input_ids": np.int32, "token_type_ids": np.int8, "words": np.int32, "first": np.int8}

PIECES = ("spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
AFTER_PADDING = frozenset(
    {
        "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet",
        "longformer", "data2vec-text", "ibert", "xmod", "luke", "mluke", "esm", "layoutlmv3",
        "lilt", "markuplm", "altclip_text_model", "bridgetower_text_model", "clap_text_model",
    }
)  # fmt: skip
"""Kinds of models whose positions begin after the number of the padding token."""

Tokenize = Callable[[Sequence[Any]], Mapping[str, list[list[int]]]]

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)


@dataclass(frozen=True)
class TextProcessor:
    """A tokenizer and its padding; ``limit`` is the longest input in tokens, or None.

    If the tokenizer has no padding token, ``pad_id`` is its end-of-text token. A model that finds
    the last token by ``config.pad_token_id`` must get this id. ``decoder_start`` is the first token
    of the decoder's input, for models with an encoder and a decoder.
    """

    tokenizer: Any
    pad_id: int
    pad_left: bool
    limit: int | None
    decoder_start: int | None = None

    def tokenize(
        self, texts: Sequence[str], max_length: int, *, written: bool = False
    ) -> dict[str, list[list[int]]]:
        """Return the tokens of each text, cut to ``max_length`` and not padded.

        The keys are the tokenizer's names. ``written``: the texts are targets that the model
        writes; some tokenizers treat targets differently.
        """
        cut = {"truncation": True, "max_length": max_length}
        if written:
            encoded = self.tokenizer(text_target=list(texts), **cut)
        else:
            encoded = self.tokenizer(list(texts), **cut)
        return {name: encoded[name] for name in encoded}

    def tokenize_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each whole text, with the end-of-text token (if any) at the end."""
        found: list[list[int]] = self.tokenizer(list(texts), truncation=False, verbose=False)[
            "input_ids"
        ]
        end = self.tokenizer.eos_token_id
        return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in found]

    def tokenize_stretches(
        self, texts: Sequence[str], max_length: int
    ) -> dict[str, list[list[int]]]:
        """Return all tokens of each text in blocks of ``max_length``, with special tokens each.

        ``first`` has one number for each block: 1 if a text begins with it, else 0.

        Raises:
            BackboneError: the tokenizer cannot cut texts into blocks.
        """
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=max_length, return_overflowing_tokens=True
        )
        if "overflow_to_sample_mapping" not in encoded:
            raise BackboneError(
                "the tokenizer returns only the first tokens of a long text",
                hint="save it with a tokenizer.json: AutoTokenizer.from_pretrained(...), then "
                "save_pretrained(...)",
            )
        of = encoded["overflow_to_sample_mapping"]
        first = [[int(one != other)] for one, other in zip(of, [-1, *of], strict=False)]
        return {**{name: encoded[name] for name in encoded}, "first": first}

    def tokenize_words(
        self, sentences: Sequence[Sequence[str]], max_length: int
    ) -> dict[str, list[list[int]]]:
        """Return the tokens of each list of words, cut to ``max_length`` and not padded.

        ``words`` are the indices of the words that the tokens belong to; -1 if there is none.
        """
        some = [list(words) for words in sentences]
        cut = {"truncation": True, "max_length": max_length}
        encoded = self.tokenizer(some, is_split_into_words=True, **cut)
        words = [
            [-1 if word is None else word for word in encoded.word_ids(at)]
            for at in range(len(some))
        ]
        return {**{name: encoded[name] for name in encoded}, "words": words}

    @cached_property
    def identity(self) -> str:
        """Return a digest of everything that decides the ids of a text."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        state = json.loads(fast.to_str()) if fast is not None else self.tokenizer.get_vocab()
        for setting in ("truncation", "padding"):  # every call changes them
            state.pop(setting, None)
        parts = [getattr(self.tokenizer, "truncation_side", ""), state]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def configure(self, config: Any) -> None:
        """Set the padding token: GPT-like classifiers need it to find the last real token."""
        config.pad_token_id = self.pad_id

    def blank(self, settings: Settings) -> Inputs:
        """Return ids, mask (and types, if the tokenizer has any) of one text, int64 [1, tokens]."""
        length = min(settings.max_length, self.limit or settings.max_length)
        ids = np.full((1, length), int(self.pad_id == 0))  # no padding: that has no positions
        found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return found | ({"token_type_ids": np.zeros_like(ids)} if self.typed else {})

    @cached_property
    def typed(self) -> bool:
        """Whether the tokenizer gives ``token_type_ids``."""
        return "token_type_ids" in self.tokenize(["a"], 8)

    def describe(self, settings: Settings, *, blocks: bool = False) -> str:
        """Return the text about the cut of texts; ``blocks``: into blocks, not only to a length."""
        cut = "into blocks of" if blocks else "to"
        return f"Text: the backbone's own tokenizer, cut {cut} {settings.max_length} tokens."


class Text(Modality):
    """Strings; each is cut to ``data.max_length`` tokens."""

    name = "text"
    kind = "string"
    files = False
    several = "texts"
    one_file = "text"
    augmented = True
    named = True

    def load(self, folder: Path, config: Any) -> TextProcessor:
        """Return the tokenizer in ``folder`` (``load_text``)."""
        return load_text(folder, config)

    def check(self, value: Any) -> None:
        """Check that a cell is a string that is not blank and has no broken character."""
        check_string(value, "text")

    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> TextExamples:
        """Return one example for each text; the ids are kept."""
        most = settings.max_length
        check_length(processor, most)
        name = (processor.identity, most, rows.digest(self.name))
        texts = rows.column(self.name)
        tokens = find_tokens(texts, lambda some: processor.tokenize(some, most), keep, name)
        return as_examples(tokens, labels, processor, most)

    def samples(
        self,
        processor: Any,
        config: Any,
        settings: Settings,
        draw: np.random.Generator,
        shape: tuple[int, int],
    ) -> Inputs:
        """Return random ids with their mask (and types), int64 [examples, tokens].

        If there are several examples, the last one is shorter.
        """
        examples, tokens = shape
        width = min(tokens, settings.max_length, processor.limit or tokens)
        ids = draw.integers(0, int(config.vocab_size), (examples, width))
        mask = np.ones_like(ids)
        if examples > 1:
            short = slice(0, width // 2) if processor.pad_left else slice(width - width // 2, width)
            ids[-1, short], mask[-1, short] = processor.pad_id, 0
        found = {"input_ids": ids, "attention_mask": mask}
        if processor.typed:
            found["token_type_ids"] = np.zeros_like(ids)
        return found


def check_string(value: Any, what: str) -> None:
    """Check that a cell is a string that is not blank and has no broken character.

    Raises:
        DataError: it is not; ``what`` is the name of the cell in the message.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"no {what}", hint="fill it in or remove the row")
    if not isinstance(value, str):
        raise DataError(
            f"the {what} is a {type(value).__name__}, not a string",
            hint="write it in quotes, or map the right column in [data.columns] of site.toml",
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise DataError(
            f"the {what} has a broken character (half a surrogate pair)",
            hint="remove the lone \\ud8xx escape",
        ) from None


def load_text(folder: Path, config: Any) -> TextProcessor:
    """Return the tokenizer in ``folder``.

    Raises:
        BackboneError: there is no tokenizer, it does not load, or it has no token for padding.
    """
    from transformers import AutoTokenizer  # this import takes seconds, and images do not need it

    # Without this check, transformers builds a tokenizer with an empty vocabulary for some models.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BackboneError(
            f"{folder} has no tokenizer",
            hint="put tokenizer.json (and tokenizer_config.json) beside its config.json",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises a bare Exception for a broken tokenizer.json
        pieces = [name for name in PIECES if (folder / name).is_file()]
        if pieces and not (folder / "tokenizer.json").is_file():
            raise BackboneError(
                f"the tokenizer in {folder} is a SentencePiece model alone ({pieces[0]}), which "
                "does not load here",
                hint="make tokenizer.json once, where the package sentencepiece is: "
                "AutoTokenizer.from_pretrained(...), then save_pretrained(...)",
            ) from None
        raise BackboneError(
            f"the tokenizer in {folder} does not load: {first_line(error)}",
            hint="a tokenizer that needs its own code cannot be used; fetch the backbone again",
        ) from None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise BackboneError(
            f"the tokenizer in {folder} has neither a padding nor an end-of-text token",
            hint="set pad_token in its tokenizer_config.json",
        )
    _check_embedding(folder, tokenizer, pad, config)
    # transformers writes "no limit" as a huge number.
    limits = [tokenizer.model_max_length, _positions(config)]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    start = getattr(config, "decoder_start_token_id", None)
    left, limit = tokenizer.padding_side == "left", min(known, default=None)
    return TextProcessor(tokenizer, int(pad), left, limit, start)


def _check_embedding(folder: Path, tokenizer: Any, pad: int, config: Any) -> None:
    """Check that the model has an embedding for every token that the tokenizer can give.

    An embedding may have more rows: they are often rounded up.

    Raises:
        BackboneError: it has fewer.
    """
    reads = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(reads, "vocab_size", None)
    highest = max([pad, *tokenizer.get_vocab().values()])
    if isinstance(rows, int) and highest >= rows:
        raise BackboneError(
            f"the tokenizer in {folder} has tokens up to number {highest}, and the model's "
            f"embedding has {rows} rows",
            hint="were tokens added? model.resize_token_embeddings(len(tokenizer)), then save both "
            "again; or it is the tokenizer of another model",
        )


def _positions(config: Any) -> int | None:
    """Return the most tokens for which the model has positions; None if it has no such limit.

    RoBERTa and its kin count positions from the padding token's number + 1. So two or so of their
    ``max_position_embeddings`` are never used.
    """
    most = getattr(config, "max_position_embeddings", None)
    if getattr(config, "position_embedding_type", "") == "rotary":  # computed, not a table: ESM-2
        return None
    if not isinstance(most, int) or getattr(config, "model_type", "") not in AFTER_PADDING:
        return most
    pad = getattr(config, "pad_token_id", None)
    return most - (pad if isinstance(pad, int) else 1) - 1


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


def as_examples(
    tokens: Arrays,
    labels: Indices,
    processor: TextProcessor,
    max_length: int,
) -> TextExamples:
    """Return the output of ``find_tokens`` as examples with ``labels``.

    No text is longer than ``max_length``.
    """
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
    )


def find_tokens(texts: Sequence[Any], tokenize: Tokenize, keep: Keep, name: NameParts) -> Arrays:
    """Return the tokens of all texts, one text after the other, and the ``lengths`` of the texts.

    A text can be a list of words. The names of the arrays are those of ``tokenize`` in ``KINDS``.

    Raises:
        DataError: a text gives no tokens.
    """
    tokens = keep.tokens(name, lambda: _tokenize_all(texts, tokenize))
    lengths = tokens["lengths"]
    if not lengths.all():
        raise DataError(
            f"text {int(np.argmin(lengths)) + 1} of {len(lengths)} becomes no tokens at all",
            hint="remove the row: the tokenizer knows none of its characters",
        )
    return tokens


def _tokenize_all(texts: Sequence[Any], tokenize: Tokenize) -> Arrays:
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
    return {**flat, "lengths": np.array(lengths, np.int64)}
