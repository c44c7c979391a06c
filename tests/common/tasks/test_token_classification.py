"""Tags become entities; a word that is several tokens counts once, one cut off as missed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedgraft.client.data.cache import Keeper
from fedgraft.client.data.rows import Columns, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.encoding import Settings
from fedgraft.common.errors import DataError, JobError
from fedgraft.common.examples import IGNORED
from fedgraft.common.metrics.tag_evaluation import TagEvaluation, TagMeasures, entities
from fedgraft.common.modalities.text import TextProcessor
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.tasks import TASKS
from fedgraft.common.tasks.token_classification import TaggedTexts

TAGS = ("O", "B-per", "I-per", "B-loc", "I-loc")
TASK = TASKS["token-classification"]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["O", "O"], set()),
        (["B-per", "I-per", "O"], {("per", 0, 2)}),
        (["B-per", "B-per"], {("per", 0, 1), ("per", 1, 2)}),
        (["B-per", "I-loc"], {("per", 0, 1), ("loc", 1, 2)}),  # as CoNLL's evaluation reads it
        (["I-loc", "I-loc", "O", "I-loc"], {("loc", 0, 2), ("loc", 3, 4)}),
        (["O", "B-loc", "I-loc", "B-per"], {("loc", 1, 3), ("per", 3, 4)}),
    ],
)
def test_tags_spell_entities(tags: list[str], found: set[tuple[str, int, int]]) -> None:
    assert entities(tags) == found


def processor() -> TextProcessor:
    """Characters are tokens, so that a word is as many as it has letters."""
    letters = {letter: at for at, letter in enumerate(["[PAD]", "[UNK]", *"abcdefghij"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    return TextProcessor(wrapped, 0, False, None)


def encoded(rows: list[tuple[list[str], list[str]]], most: int = 16) -> TaggedTexts:
    import datasets

    table = {
        "tokens": [words for words, _ in rows],
        "tags": [[TAGS.index(tag) for tag in tags] for _, tags in rows],
        "label": [0] * len(rows),
    }
    columns = Columns(datasets.Dataset.from_dict(table))
    settings = Settings(labels=TAGS, max_length=most)
    found = TASK.encode(columns, processor(), settings, Keeper(None, ""))
    assert isinstance(found, TaggedTexts)
    return found


def test_the_first_token_of_a_word_has_its_tag() -> None:
    found = encoded([(["ab", "c", "def"], ["B-per", "O", "B-loc"]), (["j"], ["O"])])
    targets = found.targets(np.arange(2))
    assert targets.tolist() == [
        [1, IGNORED, 0, 3, IGNORED, IGNORED],
        [0, *[IGNORED] * 5],
    ]
    assert not found.cut.any()
    again = found.subset(np.array([1])).joined([found])
    assert again.targets(np.arange(3), 6).tolist() == [*targets[1:].tolist(), *targets.tolist()]


def test_what_is_cut_off_counts_as_missed() -> None:
    rows = [(["abc", "def", "gh"], ["B-per", "I-per", "B-loc"])]
    found = encoded(rows, most=4)  # "def" has its first letter, "gh" nothing
    assert found.targets(np.arange(1)).tolist() == [[1, IGNORED, IGNORED, 2]]
    assert found.cut.tolist() == [[1, 0]]  # types by name: loc is missed, per is whole
    collector = TagMeasures(TAGS, 4).collect(found)
    true = found.targets(np.arange(1))
    counts = {
        "losses": [1.5], "right": [2], "counted": [2], "true": true, "predicted": true,
    }  # fmt: skip
    collector.add(np.arange(1), counts)
    figures = TagMeasures(TAGS, 4).figures(collector.evaluation().tally)
    assert figures["recall"] == 0.5 and figures["precision"] == 1.0
    assert figures["entities"]["loc"] == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "true": 1}
    assert figures["f1"] == pytest.approx(2 / 3) and figures["macro_f1"] == 0.5
    assert figures["accuracy"] == 1.0 and figures["loss"] == 0.75


def test_an_entity_that_is_cut_in_its_middle_is_missed_once() -> None:
    rows = [(["a", "b", "cd", "e"], ["B-loc", "B-per", "I-per", "I-per"])]
    found = encoded(rows, most=3)
    true = found.targets(np.arange(1))
    assert true.tolist() == [[3, IGNORED, IGNORED]] and found.cut.tolist() == [[0, 1]]
    collector = TagMeasures(TAGS, 3).collect(found)
    counts = {
        "losses": [1.0], "right": [1], "counted": [1], "true": true, "predicted": true,
    }  # fmt: skip
    collector.add(np.arange(1), counts)
    figures = TagMeasures(TAGS, 3).figures(collector.evaluation().tally)
    assert figures["entities"]["per"]["true"] == 1 and figures["f1"] == pytest.approx(2 / 3)


def evaluation(found: list[list[int]], losses: float = 1.0) -> TagEvaluation:
    """Sentences of one type with (right, predicted, true) entities."""
    count = len(found)
    ones = np.ones(count, np.int64)
    entities_of = np.array(found, np.int64)[:, None]
    return TagEvaluation(np.full(count, losses), ones, ones, entities_of, ("per",))


def test_sums_of_sites_are_those_of_the_pool() -> None:
    first, second = evaluation([[1, 1, 2], [0, 1, 0]]), evaluation([[2, 3, 2]])
    measures = TagMeasures(("O", "B-per", "I-per"), 8)
    both = first.joined([second])
    total = first.tally + second.tally
    assert measures.figures(total) == measures.figures(both.tally)
    assert measures.figures(total)["f1"] == pytest.approx(2 * 3 / (5 + 4))
    assert measures.fits(total)
    assert measures.evaluation(json.loads(json.dumps(both.to_json()))).tally.more.tolist() == [
        3,
        5,
        4,
    ]


@pytest.mark.parametrize("wrong", [[4, 3, 5], [3, 5, 2], [-1, 5, 5]])
def test_counts_that_contradict_each_other_do_not_fit(wrong: list[int]) -> None:
    tally = evaluation([[1, 2, 3]]).tally
    forged = type(tally)(tally.loss, tally.confusion, np.array(wrong))
    assert not TagMeasures(("O", "B-per", "I-per"), 8).fits(forged)


def test_a_verdict_is_of_entities_redrawn_by_sentence() -> None:
    better, worse = [[2, 2, 2]] * 30, [[1, 2, 2]] * 30
    judged = evaluation(better).compare(
        evaluation(worse), numpy_generator(0, "v"), name="ash", rival="local_only"
    )
    assert judged["outcome"] == "helped" and judged["difference"] == pytest.approx(0.5)
    assert "30 sentences" in judged["sentence"] and judged["p_value"] < 0.01
    same = evaluation(better).compare(
        evaluation(better), numpy_generator(0, "v"), name="ash", rival="local_only"
    )
    assert same["outcome"] == "unclear" and same["p_value"] == 1.0
    none = evaluation([[0, 0, 0]]).compare(
        evaluation([[0, 0, 0]]), numpy_generator(0, "v"), name="ash", rival="zero_shot"
    )
    assert none["outcome"] == "unknown" and none["interval"] is None
    hurt = evaluation(worse).compare(
        evaluation(better), numpy_generator(0, "v"), name="ash", rival="zero_shot"
    )
    assert hurt["sentence"].startswith(
        "At ash the federated model is worse than the backbone untouched: entity F1 50.0 %"
    )
    assert hurt["sentence"].endswith("This is negative transfer.")
    one = evaluation([[1, 1, 1]])
    alone = one.compare(one, numpy_generator(0, "v"), name="ash", rival="local_only")
    assert ", 1 sentence, p = 1.00)" in alone["sentence"]


def test_a_verdict_keeps_its_level_where_sentences_hold_many_entities() -> None:
    """Twenty entities of a sentence stand or fall together: they are one draw, not twenty."""
    false = 0
    for trial in range(60):
        draw = np.random.default_rng(trial)
        ours, theirs = (
            [[20 * int(hit), 20, 20] for hit in draw.random(25) < 0.5] for _ in range(2)
        )
        judged = evaluation(ours).compare(
            evaluation(theirs), numpy_generator(trial, "v"), name="a", rival="local_only"
        )
        false += judged["outcome"] in ("helped", "hurt")
    assert false <= 8  # 3 are expected; by entity it would be most of them


def job(folder: Path, lines: list[Any], *, labels: tuple[str, ...] = TAGS, **data: Any) -> Job:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw = {
        "job": {"name": "t", "task": "token-classification", "labels": list(labels)},
        "backbone": {"source": "path:nowhere"},
        "method": {"kind": "head"},
        "data": data,
    }
    return parse_job(raw, where="t")


def test_rows_are_read_by_the_columns_that_the_job_names(tmp_path: Path) -> None:
    lines = [{"words": ["Ada", "lives"], "ner": [1, 0]}]
    made = job(tmp_path, lines, tokens="words", tags="ner")
    rows = read_split(str(tmp_path / "rows.jsonl"), made).dataset
    assert rows[:]["tokens"] == [["Ada", "lives"]] and rows[:]["tags"] == [[1, 0]]
    mapped = {"tokens": "words", "tags": "ner"}
    own = read_split(str(tmp_path / "rows.jsonl"), job(tmp_path, lines), columns=mapped)
    assert own.dataset[:] == rows[:]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"tokens": "Ada lives", "tags": ["O", "O"]}, "differ in number: 0 and 2"),
        ({"tokens": ["Ada"], "tags": ["O", "O"]}, "differ in number: 1 and 2"),
        ({"tokens": ["Ada"], "tags": "O"}, "differ in number: 1 and no"),
        ({"tokens": ["Ada"], "tags": ["B-org"]}, "label 'B-org' is not in the job's list"),
        ({"tokens": ["Ada", " "], "tags": ["O", "O"]}, "no word"),
        ({"tokens": [], "tags": []}, "no list of words"),
        ({"tokens": [3], "tags": ["O"]}, "the word is a int"),
    ],
)
def test_bad_rows_are_refused_with_their_line(line: Any, why: str, tmp_path: Path) -> None:
    made = job(tmp_path, [{"tokens": ["x"], "tags": ["O"]}, line])
    with pytest.raises(DataError, match="line 2: ") as caught:
        read_split(str(tmp_path / "rows.jsonl"), made)
    assert why in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (("B-per", "I-per"), "no tag 'O'"),
        (("O", "per"), "'per' is no tag"),
        (("O", "B-", "I-"), "'B-' is no tag"),
        (("O", "B-per", "I-loc"), "no tag B-loc"),
    ],
)
def test_labels_are_tags(labels: tuple[str, ...], why: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=why):
        job(tmp_path, [], labels=labels)


def test_keys_of_another_task_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"unknown key data\.token"):
        job(tmp_path, [], token="words")
    with pytest.raises(JobError, match="the name of a column is wanted"):
        job(tmp_path, [], tokens=3)
