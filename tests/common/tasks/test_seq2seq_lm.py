"""A text and the one that is written from it: what encoder, decoder and loss are given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluations import encoded_by, text_rows
from support.language_models import CHARACTERS, job_settings, save_language_model
from support.trainings import noisy, settings, trained

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import check_stacking, open_stack
from fedgraft.client.training.evaluate import measure
from fedgraft.common.adapters.model import open_processor
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError, DataError
from fedgraft.common.examples import IGNORED, concatenate
from fedgraft.common.metrics.part_evaluation import PartEvaluation
from fedgraft.common.modalities.text import TextProcessor
from fedgraft.common.tasks.seq2seq_lm import PairedTexts

SOURCES = ["to be", "or not to be, that is", "a"]
TARGETS = ["BE", "NOT", "ANSWER"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = save_language_model("t5", tmp_path_factory.mktemp("backbone"))
    return parse_job(job_settings("t5", folder, "-", max_length=16), where="test")


def processor_of(job: Job) -> TextProcessor:
    processor = open_processor(job)[1]
    assert isinstance(processor, TextProcessor)
    return processor


def pairs(
    job: Job,
    sources: list[str] = SOURCES,
    targets: list[str] = TARGETS,
    processor: TextProcessor | None = None,
) -> PairedTexts:
    found = encoded_by(job, processor or processor_of(job), text_rows(sources, target=targets))
    assert isinstance(found, PairedTexts)
    return found


def ids(text: str) -> list[int]:
    return [CHARACTERS.index(one) for one in text]


def test_the_decoder_reads_what_it_should_have_written_so_far(job: Job) -> None:
    examples = pairs(job)
    index = np.array([1, 0])
    batch, targets = as_tensors(examples.batch(index)), torch.from_numpy(examples.targets(index))
    assert examples.width(index) == batch["input_ids"].shape[1] == 16  # cut to max_length
    assert batch["input_ids"][1, :5].tolist() == ids("to be")
    assert batch["attention_mask"].sum(1).tolist() == [16, 5]
    assert targets[1].tolist() == [*ids("BE"), *[IGNORED] * 14]
    assert batch["decoder_input_ids"][1, :3].tolist() == [0, *ids("BE")]
    assert batch["decoder_input_ids"][0, :3].tolist() == [0, *ids("NO")]


def test_some_pairs_are_the_same_pairs(job: Job) -> None:
    examples = pairs(job)
    some = examples.subset(np.array([2, 0]))
    assert len(some) == 2 and not some.labels.any()
    assert torch.equal(
        torch.from_numpy(some.targets(np.array([0]))),
        torch.from_numpy(examples.targets(np.array([2]))),
    )
    both = concatenate([some, examples.subset(np.array([1]))])
    assert isinstance(both, PairedTexts)
    order = np.array([1, 2, 0])  # of what is in both
    for key, value in as_tensors(examples.batch(np.arange(3))).items():
        assert torch.equal(as_tensors(both.batch(order))[key], value)
    assert both.subset(order).digest == examples.digest != both.digest
    assert examples.nbytes > 0


def test_perplexity_is_what_the_model_of_transformers_says(job: Job) -> None:
    stack, examples = open_stack(job), pairs(job)
    vector = noisy(stack.bench)
    found = measure(stack, stack.bench.layout, vector, examples, measures=job.measures)
    assert isinstance(found, PartEvaluation)
    assert found.counted.tolist() == [len(target) for target in TARGETS]
    stack.bench.put((stack.bench.layout, vector))
    with torch.inference_mode():
        for at, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
            told = stack.bench.model(
                input_ids=torch.tensor([ids(source)[:16]]), labels=torch.tensor([ids(target)])
            ).loss
            assert found.losses[at] == pytest.approx(float(told) * len(target), rel=1e-4)
    stack.bench.put()


def test_training_makes_the_loss_smaller_and_rows_of_sites_do_not_mix(job: Job) -> None:
    stack, examples = open_stack(job), pairs(job)
    check_stacking(stack, as_tensors(examples.batch(np.arange(3))))
    layout = stack.bench.layout
    before, after = (
        measure(stack, layout, vector, examples, measures=job.measures).tally.mean_loss
        for vector in (
            noisy(stack.bench),
            trained(stack, examples, settings(epochs=5, learning_rate=1e-2)).vector,
        )
    )
    assert after < before - 0.1


def test_a_text_that_becomes_no_tokens_is_refused(job: Job) -> None:
    for sources, targets in ((["a", "§"], ["a", "a"]), (["a", "a"], ["a", "§"])):
        with pytest.raises(DataError, match="text 2 of 2 becomes no tokens") as caught:
            pairs(job, sources, targets)
        assert caught.value.hint


def test_a_backbone_without_a_decoder_is_refused(job: Job) -> None:
    only = processor_of(job)
    bare = TextProcessor(only.tokenizer, only.pad_id, only.pad_left, only.limit)
    with pytest.raises(BackboneError, match="decoder_start_token_id") as caught:
        pairs(job, processor=bare)
    assert caught.value.hint


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    raw = job_settings("t5", save_language_model("gpt2", tmp_path), "-")
    with pytest.raises(BackboneError):
        open_stack(parse_job(raw, where="test"))
