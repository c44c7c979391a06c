"""Hidden tokens are those, and as many, as is said, and their perplexity is torch's."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.companies import Company
from support.evaluations import encoded_by, measured_parts, text_rows
from support.language_models import (
    CHARACTERS,
    CLOZE,
    job_settings,
    save_language_model,
    save_tokenizer,
)
from support.trainings import noisy, settings, trained

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.model.randomness import SiteRows
from fedgraft.client.training.evaluate import measure
from fedgraft.common.adapters.model import open_processor, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import IGNORED, Inputs, concatenate
from fedgraft.common.tasks.masked_lm import MaskedTokens

TEXTS = ["to be, or not to be", "a", "that is the question: whether 'tis nobler in the mind"]
MASK, START, END = len(CHARACTERS), len(CHARACTERS) + 1, 1
SPECIAL = {0, END, MASK, START}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model("bert", tmp_path_factory.mktemp("backbone"))


def make_job(backbone: Path, **data: Any) -> Job:
    return parse_job(job_settings("bert", backbone, "-", **data), where="test")


def encoded(backbone: Path, texts: list[str] = TEXTS, **data: Any) -> MaskedTokens:
    job = make_job(backbone, **{"max_length": 16, **data})
    found = encoded_by(job, open_processor(job)[1], text_rows(texts))
    assert isinstance(found, MaskedTokens)
    return found


def batch_of(examples: MaskedTokens) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    every = np.arange(len(examples))
    return tensors(examples.batch(every), examples.targets(every))


def tensors(
    inputs: Inputs, targets: NDArray[np.int64]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return as_tensors(inputs), torch.from_numpy(targets)


def test_all_of_a_text_is_read_in_stretches(backbone: Path) -> None:
    source = encoded(backbone).source
    words = [*CHARACTERS, *CLOZE]
    read = [
        [words[token] for token in source.ids[start : start + length]]
        for start, length in zip(source.starts, source.lengths, strict=True)
    ]
    assert all(one[0] == "<cls>" and one[-1] == "<eos>" and len(one) <= 16 for one in read)
    assert "".join("".join(one[1:-1]) for one in read) == "".join(TEXTS)


def test_what_is_hidden_is_what_is_asked_for(backbone: Path) -> None:
    examples = encoded(backbone, masked=0.3)
    inputs, targets = batch_of(examples)
    plain = as_tensors(examples.source.batch(np.arange(len(examples))))["input_ids"]
    hidden = targets != IGNORED
    assert torch.equal(targets[hidden], plain[hidden])
    assert (inputs["input_ids"][hidden] == MASK).all()
    assert torch.equal(inputs["input_ids"][~hidden], plain[~hidden])
    for row, length in enumerate(examples.lengths):
        assert int(hidden[row].sum()) == max(1, round(0.3 * (length - 2)))
    assert not {int(token) for token in targets[hidden]} & SPECIAL


def test_a_stretch_hides_the_same_wherever_it_is(backbone: Path) -> None:
    every, last = encoded(backbone), encoded(backbone, TEXTS[2:])
    joined = concatenate([last, encoded(backbone, TEXTS[:2])])
    inside = every.subset(np.arange(len(every) - len(last), len(every)))
    assert inside.digest == last.digest == joined.subset(np.arange(len(last))).digest
    assert torch.equal(batch_of(inside)[1], batch_of(last)[1])


def test_a_mask_that_a_text_has_itself_is_not_hidden(backbone: Path) -> None:
    examples = encoded(backbone, ["ab<mask>cd"])
    at = examples.source.ids.tolist().index(MASK)
    assert batch_of(examples)[1][0, at] == IGNORED


@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.05, 0.15, 0.5]), real=st.integers(0, 3))
def test_in_training_it_is_drawn_anew(backbone: Path, seed: int, share: float, real: int) -> None:
    examples = encoded(backbone, masked=share)
    every = np.arange(len(examples))
    inputs, targets = examples.batch(every), examples.targets(every)
    plain = as_tensors(examples.source.batch(every))["input_ids"]

    def draw() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows = SiteRows(real, 0, False, torch.Generator().manual_seed(seed))
        return tensors(*examples.corrupt(inputs, targets, rows))

    (varied, wanted), again = draw(), draw()
    assert torch.equal(varied["input_ids"], again[0]["input_ids"])
    assert torch.equal(wanted, again[1])
    hidden = wanted != IGNORED
    assert torch.equal(wanted[hidden], plain[hidden])
    assert torch.equal(varied["input_ids"][~hidden], plain[~hidden])
    assert not hidden[real:].any()  # nothing is drawn for rows that only fill up
    for row in range(real):
        length = examples.lengths[row] - 2
        assert int(hidden[row].sum()) == max(1, round(share * length))


def test_eight_in_ten_are_masked_and_one_is_another(backbone: Path) -> None:
    examples = encoded(backbone, ["abcdefgh" * 7] * 100, max_length=64, masked=0.5)
    every = np.arange(len(examples))
    rows = SiteRows(100, 0, False, torch.Generator().manual_seed(0))
    varied, wanted = tensors(
        *examples.corrupt(examples.batch(every), examples.targets(every), rows)
    )
    hidden = wanted != IGNORED
    shown, told = varied["input_ids"][hidden], wanted[hidden]
    kinds = Counter(
        "mask" if token == MASK else "same" if token == other else "other"
        for token, other in zip(shown.tolist(), told.tolist(), strict=True)
    )
    shares = {kind: kinds[kind] / len(told) for kind in kinds}
    assert shares == pytest.approx({"mask": 0.8, "other": 0.1, "same": 0.1}, abs=0.02)


def test_perplexity_is_that_of_torch(backbone: Path) -> None:
    job = make_job(backbone)
    stack, examples = open_stack(job), encoded(backbone)
    found = measure(
        stack, stack.bench.layout, noisy(stack.bench), examples, measures=job.measures
    ).tally
    loss, count = 0.0, 0
    with torch.inference_mode():
        for row in range(len(examples)):  # one by one, without padding
            one = np.array([row])
            logits = stack.model(**as_tensors(examples.batch(one))).logits[0].double()
            targets = torch.from_numpy(examples.targets(one))[0]
            count += int((targets != IGNORED).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert job.measures.figures(found)["perplexity"] == pytest.approx(math.exp(loss / count), 1e-5)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    folder = save_language_model("bert", tmp_path)
    save_tokenizer(folder)
    with pytest.raises(BackboneError, match="no mask token") as caught:
        encoded(folder)
    assert "causal-lm" in caught.value.hint


def test_a_backbone_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = save_language_model("bert", tmp_path)
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(BackboneError, match="saved without the head that masked-lm") as caught:
        open_workbench(make_job(folder))
    assert caught.value.hint


def test_every_epoch_is_another_and_evaluation_is_not(backbone: Path) -> None:
    job = make_job(backbone)
    stack, examples = open_stack(job), encoded(backbone, TEXTS * 3, masked=0.3)
    losses = [
        trained(stack, examples, settings(epochs=epochs, learning_rate=1e-9)).loss
        for epochs in (1, 2, 2)
    ]
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)  # of fixed gaps the mean is the same
    assert losses[1] == losses[2]
    layout = stack.bench.layout
    one, other = (
        measured_parts(stack, layout, stack.bench.initial, examples, job.measures).losses
        for _ in range(2)
    )
    assert np.array_equal(one, other)


def test_company_makes_no_difference(backbone: Path) -> None:
    stack = open_stack(make_job(backbone))
    sites = [encoded(backbone, TEXTS * 3, masked=0.3), encoded(backbone, TEXTS[:1] * 2, masked=0.3)]
    Company(stack, sites, settings(batch_size=3, epochs=2, accumulation=1)).check()


def test_stretches_of_a_text_are_of_one_document(backbone: Path) -> None:
    """Also beyond the first thousand texts, which are tokenised at once."""
    texts = ["ab", "the quick brown fox jumps over it"] * 501
    examples = encoded(backbone, texts)
    assert len(examples) > len(texts) == len(set(examples.documents.tolist()))
    tokens = np.bincount(examples.documents, examples.source.lengths - 2)
    assert tokens.tolist() == [len(text) for text in texts]
