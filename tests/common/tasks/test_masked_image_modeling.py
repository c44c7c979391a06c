"""Hidden patches are those, and as many, as is said, and their error is transformers' own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from support.companies import Company
from support.federations import adapter_of, digits_job, run_digits, write_digits
from support.trainings import noisy, settings, trained

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.model.randomness import SiteRows
from fedgraft.client.objectives import CLOSE
from fedgraft.client.training.evaluate import measure
from fedgraft.common.adapters.initial import starting_point
from fedgraft.common.adapters.model import open_processor, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError, JobError
from fedgraft.common.examples import concatenate
from fedgraft.common.metrics.part_evaluation import PartEvaluation
from fedgraft.common.tasks import TASKS
from fedgraft.common.tasks.masked_image_modeling import UNSEEN, MaskedPatches, cut_patches
from fedgraft.server.plan import make_plan

PAINT = ("job.task=masked-image-modeling", "job.labels=[]", "simulation.partition={kind='iid'}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_digits(tmp_path_factory.mktemp("digits"), 90, 30)


def examples_of(job: Job) -> MaskedPatches:
    assert job.simulation is not None
    found = encode(read_split(job.simulation.train, job).dataset, open_processor(job)[1], job,
                   store=None, key="")  # fmt: skip
    assert isinstance(found, MaskedPatches)
    return found.subset(np.arange(24))


def batch_of(examples: MaskedPatches) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    every = np.arange(len(examples))
    return as_tensors(examples.batch(every)), torch.from_numpy(examples.targets(every))


def test_an_image_is_cut_row_by_row() -> None:
    image = np.arange(2 * 4 * 6, dtype=np.float32).reshape(1, 2, 4, 6)
    patches = cut_patches(image, 2)
    assert patches.shape == (1, 6, 8)
    for at in range(6):
        row, column = 2 * (at // 3), 2 * (at % 3)
        own = image[0, :, row : row + 2, column : column + 2]
        assert np.array_equal(patches[0, at], own.reshape(-1))


@pytest.mark.parametrize(("share", "count"), [(None, 10), (0.25, 4), (0.01, 1)])
def test_what_is_hidden_is_what_is_asked_for(
    share: float | None, count: int, rows: tuple[str, ...]
) -> None:
    more = () if share is None else (f"data.masked={share}",)
    examples = examples_of(digits_job(*rows, *PAINT, *more))
    inputs, targets = batch_of(examples)
    assert inputs[UNSEEN].shape == (len(examples), 16)  # 8 x 8 pixels in patches of 2 x 2
    assert (inputs[UNSEEN].sum(1) == count).all()
    patches = torch.from_numpy(cut_patches(inputs["pixel_values"].numpy(), 2))
    assert torch.equal(targets[inputs[UNSEEN]], patches[inputs[UNSEEN]])
    assert targets[~inputs[UNSEEN]].isnan().all()


def test_an_image_hides_the_same_wherever_it_is(rows: tuple[str, ...]) -> None:
    examples = examples_of(digits_job(*rows, *PAINT))
    half = examples.subset(np.arange(5, 12))
    joined = concatenate([examples.subset(np.arange(20, 24)), half])
    assert half.digest == joined.subset(np.arange(4, 11)).digest != examples.digest
    assert not np.array_equal(examples.hidden[0], examples.hidden[1])


@given(seed=st.integers(0, 2**32), real=st.integers(0, 24))
def test_in_training_it_is_drawn_anew(rows: tuple[str, ...], seed: int, real: int) -> None:
    examples = examples_of(digits_job(*rows, *PAINT))
    every = np.arange(len(examples))
    inputs, targets = examples.batch(every), examples.targets(every)
    found = [
        examples.corrupt(
            inputs, targets, SiteRows(real, 0, False, torch.Generator().manual_seed(s))
        )
        for s in (seed, seed, seed + 1)
    ]
    (one, wanted), (again, _), (other, _) = found
    assert np.array_equal(one[UNSEEN], again[UNSEEN])
    assert real < 2 or not np.array_equal(one[UNSEEN], other[UNSEEN])
    assert np.array_equal(one[UNSEEN].sum(1), inputs[UNSEEN].sum(1))
    assert np.array_equal(one[UNSEEN][real:], inputs[UNSEEN][real:])
    assert np.array_equal(~np.isnan(wanted).all(-1), one[UNSEEN])


def test_the_error_is_that_of_transformers(rows: tuple[str, ...]) -> None:
    job = digits_job(*rows, *PAINT)
    stack, examples = open_stack(job), examples_of(job)
    found = measure(stack, stack.bench.layout, noisy(stack.bench), examples, measures=job.measures)
    assert isinstance(found, PartEvaluation)
    inputs, _ = batch_of(examples)
    with torch.inference_mode():
        output = stack.model(**inputs)
    painted, wanted = (
        cut_patches(pixels.numpy(), 2) for pixels in (output.reconstruction, inputs["pixel_values"])
    )
    off = torch.from_numpy(painted - wanted).abs()
    figures = job.measures.figures(found.tally)
    assert figures["loss"] == pytest.approx(float(output.loss), rel=1e-4)
    close = off.mean(-1)[inputs[UNSEEN]] < CLOSE
    assert figures["accuracy"] == pytest.approx(float(close.float().mean()))
    assert "perplexity" not in figures and set(figures) == {"loss", "accuracy"}


def test_every_epoch_is_another(rows: tuple[str, ...]) -> None:
    job = digits_job(*rows, *PAINT)
    stack, examples = open_stack(job), examples_of(job)
    losses = [
        trained(stack, examples, settings(epochs=epochs, learning_rate=1e-9)).loss
        for epochs in (1, 2, 2)
    ]
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)  # of fixed patches the mean is the same
    assert losses[1] == losses[2]


def test_company_makes_no_difference(rows: tuple[str, ...]) -> None:
    job = digits_job(*rows, *PAINT)
    examples = examples_of(job)
    sites = [examples.subset(np.arange(17)), examples.subset(np.arange(17, 24))]
    Company(open_stack(job), sites, settings(batch_size=8, epochs=2)).check()


@pytest.fixture(scope="module")
def finished(rows: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_digits(tmp_path_factory.mktemp("runs"), *rows, *PAINT, "rounds.count=4",
                      "simulation.baselines=['local_only', 'central']")  # fmt: skip


@pytest.mark.slow
def test_a_federation_learns_it_and_says_for_whom(finished: Any) -> None:
    run, summary = finished
    losses = [line["validation"]["loss"] for line in run.history()]
    assert losses[-1] < losses[0]
    final = summary["final"]["federated"]
    low, high = final["loss_interval"]
    assert low <= final["loss"] <= high
    for site in summary["sites"]:
        assert "reconstruction error" in site["verdict"] and "a pixel" in site["verdict"]
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Reconstruction error" in page and "macro F1" not in page
    card = (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "paint hidden parts of an image" in card


def test_it_is_given_away(finished: Any) -> None:
    run, _ = finished
    bench = open_workbench(run.job)
    exchanged = make_plan(run.job, bench, run.session).exchanged
    inputs, _ = batch_of(examples_of(run.job).subset(np.arange(3)))
    bench.put((exchanged, adapter_of(run)))
    with torch.inference_mode():
        wanted = bench.model(**inputs).reconstruction.clone()
    bench.put()
    auto = transformers.AutoModelForMaskedImageModeling
    plain = auto.from_pretrained(run.folder / "adapter" / "backbone")
    loaded = PeftModel.from_pretrained(plain, run.folder / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).reconstruction, wanted, atol=1e-5, rtol=1e-4)


def test_labels_go_on_from_there(finished: Any, rows: tuple[str, ...]) -> None:
    run, _ = finished
    folder = f"start.adapter={run.folder / 'adapter'}"
    job = digits_job(*rows, folder, "start.head=false")
    bench = open_workbench(job)
    exchanged = make_plan(job, bench, "").exchanged
    start = starting_point(job, bench, exchanged)
    paths = exchanged.only(name for name in exchanged.names if ".lora_" in name)
    before = make_plan(run.job, open_workbench(run.job), run.session).exchanged
    assert np.array_equal(exchanged.part(start, paths), before.part(adapter_of(run), paths))


@pytest.mark.parametrize("kind", ["resnet", None, "clip"])
def test_other_kinds_of_backbones_are_refused(kind: str | None) -> None:
    with pytest.raises(BackboneError, match="cannot be hidden") as caught:
        TASKS["masked-image-modeling"].model_options({"model_type": kind}, (), "path:x")
    assert "vit" in caught.value.hint


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.label_smoothing=0.1", "no labels to smooth"),
        ("evaluation.score_bins=20", "predicts patches"),
        ("training.distillation={}", "all patches"),
        ("training.domain.kind=coral", "no labels"),
        ("training.augmentation.image={flip=true}", "for classifications"),
        ("simulation.partition={kind='dirichlet'}", "deals labels unevenly"),
        ("job.labels=['a', 'b']", "has no labels"),
    ],
)
def test_what_only_labels_have_is_refused(override: str, told: str) -> None:
    with pytest.raises(JobError, match=told) as caught:
        digits_job(*PAINT, override)
    assert caught.value.hint


def test_a_folder_of_images_without_labels_will_do(tmp_path: Path, rows: tuple[str, ...]) -> None:
    from PIL import Image

    (tmp_path / "scans").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), 60 * number).save(tmp_path / "scans" / f"{number}.png")
    job = digits_job(*rows, *PAINT)
    found = read_split(str(tmp_path / "scans"), job).dataset
    assert found[:]["label"] == [0, 0, 0]
