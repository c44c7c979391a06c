"""What a run gives away loads with plain peft and transformers, and computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from support.exports import Exported, logits, make_job, save_resnet
from support.matrix import thinned

from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.training.trainer import TrainingTask, train_alone
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import InputError
from fedgraft.common.examples import ImageExamples
from fedgraft.server.export.adapter import export_adapter
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run

KINDS = ["vit", "vit-head", "vit-dora", "vit-partial", "vit-biases", "bert", "resnet"]


@pytest.fixture(params=thinned(KINDS, 2))
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Exported:
    return Exported(request.param, tmp_path)


def auto(kind: str) -> Any:
    text = transformers.AutoModelForSequenceClassification
    return text if kind == "bert" else transformers.AutoModelForImageClassification


def test_the_adapter_loads_on_a_fresh_backbone(exported: Exported, tmp_path: Path) -> None:
    folder = exported.peft(tmp_path / "out")
    source = exported.bench.backbone.folder
    # As the model card says.
    count = len(exported.run.job.job.labels)
    backbone = auto(exported.kind).from_pretrained(
        source, num_labels=count, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(backbone, folder)
    torch.testing.assert_close(logits(model, exported.kind), exported.wanted, rtol=0, atol=1e-5)
    assert (exported.wanted - exported.untrained).abs().max() > 0.01


def test_the_merged_model_loads_without_peft(exported: Exported, tmp_path: Path) -> None:
    folder = exported.merged(tmp_path / "out")
    model = auto(exported.kind).from_pretrained(folder)
    assert not isinstance(model, PeftModel)
    torch.testing.assert_close(logits(model, exported.kind), exported.wanted, rtol=0, atol=1e-5)
    assert list(model.config.id2label.values()) == list(exported.run.job.job.labels)
    # Merging did not change the model that is still in use here.
    exported.bench.put((exported.plan.exchanged, exported.adapter))
    torch.testing.assert_close(logits(exported.bench.model, exported.kind), exported.wanted)


def test_the_configuration_names_the_variant(tmp_path: Path) -> None:
    for kind, variant in (("vit", False), ("vit-dora", True)):
        (tmp_path / kind).mkdir()
        folder = Exported(kind, tmp_path / kind).peft(tmp_path / kind / "out")
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert (told["use_dora"], told["use_rslora"]) == (variant, variant)


@pytest.mark.parametrize("merged", [False, True])
def test_no_file_names_this_machines_folders(
    exported: Exported, tmp_path: Path, merged: bool
) -> None:
    folder = (exported.merged if merged else exported.peft)(tmp_path / "out")
    private = [str(tmp_path), str(Path.home()), str(exported.bench.backbone.folder.parent)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        content = path.read_bytes()
        assert not [text for text in private if text.encode() in content], path.name


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_says_where_the_model_comes_from(
    exported: Exported, tmp_path: Path, merged: bool
) -> None:
    folder = (exported.merged if merged else exported.peft)(tmp_path / "out")
    card = (folder / "README.md").read_text(encoding="utf-8")
    job = exported.run.job
    assert "2 rounds of `fedavg`" in card
    assert ", ".join(job.job.labels) in card
    assert exported.bench.backbone.fingerprint in card
    assert exported.run.name in card
    assert job.job.task in card
    assert ("merged into its weights" in card) == merged
    assert ("PeftModel.from_pretrained" in card) == (not merged)


@pytest.fixture
def vit(tmp_path: Path) -> Exported:
    return Exported("vit", tmp_path)


def test_a_merged_text_model_keeps_its_tokenizer(tmp_path: Path) -> None:
    folder = Exported("bert", tmp_path).merged(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("lost card")["input_ids"] == [7, 6]


@pytest.mark.parametrize("merged", [False, True])
def test_a_folder_of_somebody_else_is_not_replaced(
    vit: Exported, tmp_path: Path, merged: bool
) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not an export of fedgraft") as caught:
        (vit.merged if merged else vit.peft)(target)
    assert caught.value.exit_code == 2
    assert [path.name for path in target.iterdir()] == ["chapter.tex"]
    assert (target / "chapter.tex").read_text() == "years of work"


def test_a_model_of_somebody_else_is_not_replaced(vit: Exported, tmp_path: Path) -> None:
    # A backbone folder has a config.json as a merged export has: it may be the only copy.
    target = tmp_path / "precious"
    save_resnet(target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(InputError):
        vit.merged(target)
    assert (target / "model.safetensors").read_bytes() == before


def test_an_empty_folder_is_filled_and_an_earlier_export_replaced(
    vit: Exported, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    vit.peft(target)
    first = (target / "adapter_model.safetensors").read_bytes()
    (target / "stale.txt").write_text("of the first export")
    vit.adapter = vit.adapter * np.float32(2)
    vit.peft(target)
    assert (target / "adapter_model.safetensors").read_bytes() != first
    assert not (target / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_a_place_that_cannot_be_written_is_bad_input(vit: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write") as caught:
        vit.peft(tmp_path / "file" / "out")
    assert "--out" in caught.value.hint


def test_a_failed_export_leaves_the_earlier_one(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = vit.peft(tmp_path / "out")
    before = (target / "adapter_model.safetensors").read_bytes()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(vit.bench.model), "save_pretrained", full)
    with pytest.raises(InputError, match="No space left"):
        vit.peft(target)
    assert (target / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_a_model_that_was_just_trained_with_dropout_can_be_exported(tmp_path: Path) -> None:
    # In a simulation a site has trained on the very tensors that are exported.
    vit = Exported("vit", tmp_path)
    pixels = np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32)
    examples = ImageExamples(np.arange(8), pixels, np.arange(8))
    job = vit.run.job
    settings = job.training.model_copy(update={"dropout": 0.5})
    stack = open_stack(job)
    assert stack.bench is vit.bench
    task = TrainingTask(examples, vit.bench.initial, torch.Generator().manual_seed(1))
    train_alone(stack, vit.bench.layout, task, settings=settings)
    model = auto("vit").from_pretrained(vit.merged(tmp_path / "out"))
    torch.testing.assert_close(logits(model, "vit"), vit.wanted, rtol=0, atol=1e-5)


def test_a_local_head_is_not_given_away(tmp_path: Path) -> None:
    raw = make_job("vit", tmp_path).model_dump(mode="json", exclude_none=True)
    raw["method"]["head"] = "local"
    job = parse_job(raw, where="test")
    bench, run = open_workbench(job), Run.create(tmp_path / "runs", job)
    plan = make_plan(job, bench, run.session)
    trained = bench.initial + np.float32(1)
    bench.put((bench.layout, trained))  # what a site that shares this process left behind
    export_adapter(run, bench, plan.exchanged, bench.initial_of(plan.exchanged), tmp_path / "out")
    from safetensors.numpy import load_file

    head = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (bias,) = (value for name, value in head.items() if name.endswith("classifier.bias"))
    where = next(name for name in bench.local.names if name.endswith("bias"))
    assert np.array_equal(bias, bench.initial[bench.layout.slices[where]])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the head in this folder is untrained" in card


@pytest.mark.parametrize("change", ["frozen-head", "random-weights"])
def test_what_was_drawn_from_a_seed_is_given_along(tmp_path: Path, change: str) -> None:
    """The backbone's folder does not have it: without it the adapter is of no use."""
    job = make_job("resnet", tmp_path / "backbone")
    if change == "frozen-head":
        method = job.method.model_copy(update={"head": "frozen"})
        job = job.model_copy(update={"method": method})
    else:
        backbone = job.backbone.model_copy(update={"weights": "random"})
        job = job.model_copy(update={"backbone": backbone})
    bench = open_workbench(job)
    run = Run.create(tmp_path / "runs", job)
    plan = make_plan(job, bench, run.session)
    adapter = bench.initial_of(plan.exchanged) + np.float32(0.1)
    export_adapter(run, bench, plan.exchanged, adapter, tmp_path / "out")
    bench.put((plan.exchanged, adapter))
    wanted = logits(bench.model, "resnet")
    base = auto("resnet").from_pretrained(tmp_path / "out" / "backbone")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(model, "resnet"), wanted, rtol=0, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "THIS_FOLDER/backbone" in card


def test_an_adapter_that_needs_no_more_than_its_backbone_has_none_along(
    vit: Exported, tmp_path: Path
) -> None:
    assert not (vit.peft(tmp_path / "out") / "backbone").exists()
