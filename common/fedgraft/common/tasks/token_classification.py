"""Token classification: predict a tag for each word, and the entities that the tags mark (IOB2).

A word can have several tokens: the first token has the word's tag, and the other tokens are not
predicted. A sentence is one example, cut to ``data.max_length``. An entity beyond the cut counts as
missed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fedgraft.common.encoding import Keep, Rows, Settings
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import (
    IGNORED,
    Indices,
    Inputs,
    TextExamples,
    concatenate,
)
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.tag_evaluation import OUTSIDE, TagMeasures, entities, types_of
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.modalities.text import as_examples, check_length, check_string, find_tokens
from fedgraft.common.section import IllegalJob
from fedgraft.common.tasks.base import Cell, Differences, Reading, Task, Wrapped, count_marked
from fedgraft.common.tasks.labels import head_usage, label_index, label_options
from fedgraft.common.tasks.refusals import without_classes

__all__ = ["TaggedTexts", "TokenClassification"]

F1 = Metric("f1", "entity F1", short="F1")
ACCURACY = Metric("accuracy", "token accuracy", short="right")
MACRO_F1 = Metric("macro_f1", "macro F1 over types", hub="f1")

REFUSES = without_classes(
    "tags of words",
    more={
        "heads": ("{task} has one head for all tags", "leave job.heads out"),
        "distillation": (
            "a teacher gives one distribution over labels an example, and {task} has many",
            "leave training.distillation out",
        ),
        "dirichlet": (
            'partition.kind = "dirichlet" deals examples by their label, and a sentence '
            "has many tags",
            'simulation.partition = {{ kind = "natural" }}, one file a site, or "iid"',
        ),
        "wrong_labels": (
            'faults.poison = "labels" gives examples another label, and a sentence has many tags',
            'simulation.faults.poison = "sign-flip", "noise" or "nan"',
        ),
        "domain": ("{task} reads no sentences without tags", "leave training.domain out"),
        "selection": (
            "{task} has many tags an example, and backbones are scored by one label",
            "a classification job; or compare runs with `fedgraft sweep`",
        ),
    },
)


@dataclass(frozen=True)
class TaggedTexts(Wrapped):
    """Sentences with tags.

    ``tags``, int64 [tokens of source], are ``IGNORED`` except at the first token of a word.
    ``cut``, int64 [n, types], counts the entities with a word beyond the end of the example.
    """

    source: TextExamples
    tags: Indices
    cut: Indices

    @property
    def digest(self) -> str:
        """Return the digest of ``source``."""
        return self.source.digest

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return self.source.nbytes + self.tags.nbytes + self.cut.nbytes

    @property
    def target_count(self) -> int:
        """Return the number of words that have a tag and stand in an example."""
        return count_marked(self.tags != IGNORED, self.source)

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return the sentences at ``index`` in the form of ``TextExamples``."""
        return self.source.batch(index, width)

    def targets(self, index: Indices, width: int = 0) -> Indices:
        """Return the tags, int64 [b, width]; ``IGNORED`` at padding and inside words."""
        mask = self.batch(index, width)["attention_mask"].astype(np.bool_)
        targets: Indices = np.full(mask.shape, IGNORED, np.int64)
        ranges = [
            self.tags[start : start + length]
            for start, length in zip(
                self.source.starts[index].tolist(), self.source.lengths[index].tolist(), strict=True
            )
        ]
        targets[mask] = np.concatenate([np.empty(0, np.int64), *ranges])
        return targets

    def subset(self, index: Indices) -> "TaggedTexts":
        """Return the sentences at ``index``, in that order; ids and tags are shared."""
        return replace(self, source=self.source.subset(index), cut=self.cut[index])

    def joined(self, others: "Sequence[TaggedTexts]") -> "TaggedTexts":
        """Return these sentences and the sentences of ``others``, in order."""
        every = (self, *others)
        return TaggedTexts(
            concatenate([one.source for one in every]),
            np.concatenate([one.tags for one in every]),
            np.concatenate([one.cut for one in every]),
        )


class TokenClassification(Task):
    """Predict a tag for each word of a sentence, such as the tags of named entities."""

    name = pipeline = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    modality = MODALITIES["text"]
    target = "tokens"
    beside = "tags"
    content = "tokens"
    content_kind = "strings"
    keys: Mapping[str, str | float] = MappingProxyType({"tokens": "tokens", "tags": "tags"})
    stored: Mapping[str, str] = MappingProxyType({"tags": "int64s"})
    wants_labels = True
    metrics = (F1, ACCURACY)
    watched = (*metrics, MACRO_F1)
    card_metrics = (
        F1,
        Metric("precision", "entity precision"),
        Metric("recall", "entity recall"),
        MACRO_F1,
        Metric("accuracy", "token accuracy"),
    )
    card_note = (
        "An entity is right where its type and both its ends are. A word that is cut into several "
        "tokens has the tag of the first. "
    )
    examples = "sentences"
    intervals = (
        "Entity F1 and token accuracy have bootstrap intervals over sentences, each redrawn with "
        "all of its entities."
    )
    verdicts = (
        '"Helped" and "hurt" need both a paired permutation test over sentences below 5 % and a '
        "95 % bootstrap interval of the difference in entity F1 that excludes zero. Both models "
        "tag the same sentences."
    )
    differences = Differences(
        "in points of entity F1, on the site's own test sentences. Below it its 95 % interval, by "
        "bootstrap over sentences",
        ("Entity F1", "Permutation p"),
        points=True,
    )
    use = "tag the entities of a text"
    refuses = REFUSES

    def check_labels(self, labels: Sequence[str]) -> None:
        """Check that the labels are IOB2 tags."""
        super().check_labels(labels)
        kinds = [label.partition("-") for label in labels if label != OUTSIDE]
        wrong = [p + dash + own for p, dash, own in kinds if p not in ("B", "I") or not own]
        alone = sorted({own for _, _, own in kinds} - {own for p, _, own in kinds if p == "B"})
        problems = [f"{one!r} is no tag" for one in wrong]
        problems += [f"there is no tag B-{one}" for one in alone]
        if OUTSIDE not in labels:
            problems.append(f"there is no tag {OUTSIDE!r}")
        if problems:
            raise IllegalJob(
                f"job.labels of {self.name} are tags of IOB2: {problems[0]}",
                'labels = ["O", "B-person", "I-person", ...]',
            )

    def check_cell(self, content: Any) -> None:
        """Check that a cell is a list of words."""
        if not isinstance(content, list) or not content:
            raise DataError(
                "no list of words",
                hint='write tokens as a list, as in {"tokens": ["Ada", "lives"], "tags": [...]}; '
                "CSV cannot hold lists: use JSONL or Parquet",
            )
        for word in content:
            check_string(word, "word")

    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return the indices of the tags, one for each word."""
        words = cell.content if isinstance(cell.content, list) else []
        if not isinstance(cell.beside, list) or len(cell.beside) != len(words):
            count = len(cell.beside) if isinstance(cell.beside, list) else "no"
            raise DataError(
                f"words and tags differ in number: {len(words)} and {count}",
                hint="a list with one tag for each word",
            )
        return {
            "label": 0,
            "tags": [label_index(tag, reading, typed=cell.typed) for tag in cell.beside],
        }

    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the names of the tags."""
        return {"tags": [labels[tag] for tag in row["tags"]]}

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> TaggedTexts:
        """Return one example per sentence; the first token of each word has the word's tag.

        Raises:
            BackboneError: the tokenizer does not give the word of a token.
            DataError: a sentence gives no tokens.
        """
        most = settings.max_length
        check_length(processor, most)
        if not processor.tokenizer.is_fast:
            raise BackboneError(
                "the backbone's tokenizer does not say which word a token is of",
                hint="a backbone with a tokenizer.json",
            )
        sentences = rows.column("tokens")
        name = (processor.identity, "words", most, rows.digest("tokens"))
        tokens = find_tokens(
            sentences, lambda some: processor.tokenize_words(some, most), keep, name
        )
        source = as_examples(tokens, np.zeros(len(sentences), np.int64), processor, most)
        tags = [np.array(one, np.int64) for one in rows.column("tags")]
        aligned, seen = _align(tokens["words"], source, tags, settings.labels)
        return TaggedTexts(source, aligned, _cut_off(tags, seen, settings.labels))

    def measures(self, settings: Settings) -> TagMeasures:
        """Return the measures: the number of correct tokens, and the entities by type."""
        return TagMeasures(settings.labels, settings.max_length)

    def model_options(
        self, config: Mapping[str, Any], labels: Sequence[str], source: str
    ) -> dict[str, Any]:
        """Return the tags."""
        return label_options(labels)

    def usage(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the options for a head with one output per tag; the adapter then replaces it."""
        return head_usage(len(labels))


def _align(
    words: Indices, source: TextExamples, tags: Sequence[Indices], labels: Sequence[str]
) -> tuple[Indices, list[int]]:
    """Return the tag of each token, and the number of words that each example contains.

    The tag is ``IGNORED`` except at a word's first token.
    """
    aligned = np.full(len(source.ids), IGNORED, np.int64)
    seen: list[int] = []
    places = zip(source.starts.tolist(), source.lengths.tolist(), tags, strict=True)
    for start, length, mine in places:
        own = words[start : start + length]
        first = (own >= 0) & (own != np.concatenate([[-1], own[:-1]]))
        aligned[start : start + length][first] = mine[own[first]]
        seen.append(int(own.max(initial=-1)) + 1)
        if (begun := _begun(mine, seen[-1], labels)) is not None:
            aligned[start : start + length][own >= begun] = IGNORED
    return aligned, seen


def _begun(tags: Indices, seen: int, labels: Sequence[str]) -> int | None:
    """Return the first word of an entity that continues after the last seen word.

    Return None if there is none.
    """
    if seen == len(tags):
        return None
    across = [
        start
        for _, start, end in entities([labels[tag] for tag in tags.tolist()])
        if start < seen < end
    ]
    return across[0] if across else None


def _cut_off(tags: Sequence[Indices], seen: Sequence[int], labels: Sequence[str]) -> Indices:
    """Return the entities of each sentence, by type, with a word after the last ``seen`` word."""
    types = types_of(labels)
    cut = np.zeros((len(tags), len(types)), np.int64)
    for at, (mine, last) in enumerate(zip(tags, seen, strict=True)):
        if last < len(mine):
            inside = entities([labels[tag] for tag in mine[:last].tolist()])
            for kind, *_ in entities([labels[tag] for tag in mine.tolist()]) - inside:
                cut[at, types.index(kind)] += 1
    return cut
