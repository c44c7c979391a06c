"""Documents become blocks in which every token is predicted once, and perplexity is torch's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.evaluations import NOWHERE, measured_parts, text_rows
from support.language_models import CHARACTERS, job_settings, save_language_model
from support.trainings import noisy

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.cache import WORTH_A_FILE, Keeper, Store
from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.common.adapters.model import open_processor
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import IGNORED, TextExamples
from fedgraft.common.modalities.text import TextProcessor
from fedgraft.common.tasks.causal_lm import Blocks, cut_blocks, encode_blocks

TEXTS = [
    "to be, or not to be",
    "a",
    "that is the question: whether 'tis nobler in the mind to suffer",
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model("gpt2", tmp_path_factory.mktemp("backbone"))


def make_job(backbone: Path, **data: Any) -> Job:
    return parse_job(job_settings("gpt2", backbone, "-", **data), where="test")


def encoded(backbone: Path, texts: list[str], most: int) -> Blocks:
    processor = open_processor(make_job(backbone))[1]
    assert isinstance(processor, TextProcessor)
    return encode_blocks(text_rows(texts), processor, most, NOWHERE)


@given(
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    most=st.integers(2, 12),
    left=st.booleans(),
)
def test_every_token_but_the_first_of_a_document_is_predicted_once(
    documents: list[int], most: int, left: bool
) -> None:
    lengths = np.array(documents, np.int64)
    starts, sizes, of = cut_blocks(lengths, most)
    assert sizes.max() <= most and sizes.min() >= 1
    ends = np.cumsum(lengths)
    assert np.array_equal(of, np.searchsorted(ends, starts, side="right"))
    ids = np.arange(1, lengths.sum() + 1, dtype=np.int32)  # each token names its place
    source = TextExamples(np.zeros(len(starts), np.int64), ids, starts, sizes, None, 0, left, most)
    blocks = Blocks(source, of)
    every = np.arange(len(blocks))
    targets = torch.from_numpy(blocks.targets(every))
    inputs = as_tensors(blocks.batch(every))["input_ids"]
    told = targets != IGNORED
    first = set((np.cumsum(lengths) - lengths + 1).tolist())
    wanted = [place for place in ids.tolist() if place not in first]
    assert sorted(targets[told].tolist()) == wanted
    # What is predicted follows what was read last, in the same document.
    assert torch.equal(targets[told], inputs[told] + 1)


def test_a_block_ends_where_its_document_ends(backbone: Path) -> None:
    blocks = encoded(backbone, ["abcde", "xy"], 4).source
    read = [blocks.ids[s : s + n].tolist() for s, n in zip(blocks.starts, blocks.lengths)]  # noqa: B905
    told = ["".join(CHARACTERS[token] for token in block) for block in read]
    assert told == ["abcd", "de<eos>", "xy<eos>"]


def by_torch(stack: Stack, texts: list[str], most: int) -> tuple[float, int, int]:
    """Summed cross entropy, tokens predicted and tokens right: document by document, by hand."""
    model, loss, count, right = stack.model, 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([*(CHARACTERS.index(one) for one in text), 1])
        for start in range(0, len(ids) - 1, most - 1):
            block = ids[start : start + most]
            logits = model(input_ids=block[None]).logits[0, :-1]
            loss += float(
                torch.nn.functional.cross_entropy(logits.double(), block[1:], reduction="sum")
            )
            count += len(block) - 1
            right += int((logits.argmax(-1) == block[1:]).sum())
    return loss, count, right


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_perplexity_is_that_of_torch(kind: str, tmp_path: Path) -> None:
    folder = save_language_model(kind, tmp_path)
    job = parse_job(job_settings(kind, folder, "-"), where="test")
    stack = open_stack(job)
    vector, blocks = noisy(stack.bench), encoded(folder, TEXTS, 9)
    found = measured_parts(stack, stack.bench.layout, vector, blocks, job.measures)
    with torch.inference_mode():
        loss, count, right = by_torch(stack, TEXTS, 9)
    assert (found.counted.sum(), found.right.sum()) == (count, right)
    figures = job.measures.figures(found.tally)
    assert figures["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert figures["accuracy"] == right / count
    assert count == sum(len(text) for text in TEXTS)  # all but the first, and the end


def test_blocks_of_any_order_come_to_the_same(backbone: Path) -> None:
    job = make_job(backbone)
    stack = open_stack(job)
    layout, vector = stack.bench.layout, noisy(stack.bench)
    blocks = encoded(backbone, TEXTS, 5)
    plain = measured_parts(stack, layout, vector, blocks, job.measures)
    order = np.random.default_rng(2).permutation(len(blocks))
    other = measured_parts(stack, layout, vector, blocks.subset(order), job.measures)
    np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-5)
    assert np.array_equal(other.counted, plain.counted)
    # A text is one draw, in however many blocks it was read.
    assert plain.counted.tolist() == [len(text) for text in TEXTS] and len(blocks) > len(TEXTS)


def test_texts_of_two_sites_stay_different_texts(backbone: Path) -> None:
    one, other = encoded(backbone, ["a" * 9, "b"], 5), encoded(backbone, ["c" * 9, "dd"], 5)
    picked = other.subset(np.array([3, 0]))  # the short text and a part of the long one
    together = one.joined([picked, one])
    assert one.documents.tolist() == [0, 0, 0, 1]
    assert together.documents.tolist() == [0, 0, 0, 1, 3, 2, 4, 4, 4, 5]


def test_no_text_is_an_empty_tally(backbone: Path) -> None:
    job = make_job(backbone)
    stack, blocks = open_stack(job), encoded(backbone, TEXTS, 5)
    nothing = blocks.subset(np.empty(0, np.int64))
    layout, initial = stack.bench.layout, stack.bench.initial
    found = measured_parts(stack, layout, initial, nothing, job.measures)
    assert found.tally.examples == 0


def test_a_text_that_becomes_no_tokens_is_refused(backbone: Path) -> None:
    silent = parse_job(job_settings("gpt2", backbone, "-"), where="test")
    processor = open_processor(silent)[1]
    assert isinstance(processor, TextProcessor)
    processor.tokenizer.eos_token = None  # behind every document, if there is one
    try:
        with pytest.raises(DataError, match="text 2 of 2 becomes no tokens") as caught:
            encode_blocks(text_rows(["abc", "§§"]), processor, 8, NOWHERE)
    finally:
        processor.tokenizer.eos_token = "<eos>"
    assert caught.value.hint and "§" not in str(caught.value)


def test_blocks_longer_than_the_backbone_reads_are_refused(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be")
    job = make_job(backbone, max_length=100)
    rows = read_split(str(tmp_path / "a.txt"), job).dataset
    with pytest.raises(BackboneError, match="reads 64 tokens"):
        encode(rows, open_processor(job)[1], job, store=None, key="")


def test_tokens_are_kept_and_found_again(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = open_processor(make_job(backbone))[1]
    assert isinstance(processor, TextProcessor)
    many = text_rows(TEXTS * (WORTH_A_FILE // 100))
    keep = Keeper(Store(tmp_path, memory=0, disk=10**9), "k")
    first = encode_blocks(many, processor, 9, keep)
    monkeypatch.setattr(TextProcessor, "tokenize_documents", None)  # must not be called again
    again = encode_blocks(many, processor, 9, keep)
    assert np.array_equal(first.source.ids, again.source.ids) and first.digest == again.digest
    longer = encode_blocks(many, processor, 30, keep)
    assert len(longer) < len(first)
    assert np.array_equal(longer.source.ids, first.source.ids)
