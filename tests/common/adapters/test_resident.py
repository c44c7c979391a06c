"""A process holds one backbone: of these files, once, whatever jobs ask for it."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.trainings import make_job
from torch import nn

from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.participant import open_participant
from fedgraft.common.adapters import model
from fedgraft.common.adapters.model import open_processor, open_workbench
from fedgraft.common.adapters.resident import KEPT, Resident, close_backbone, resident
from fedgraft.common.backbones import load
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError

WORDS = "bert.embeddings.word_embeddings.weight"


def bert(folder: Path, seed: int = 0) -> None:
    """Weights that are drawn, and a tokenizer."""
    job = make_job("bert")
    source = Path(job.backbone.source.removeprefix("path:"))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def job_of(folder: Path, name: str = "t", seed: int = 0, **method: Any) -> Job:
    job = make_job("bert", **method)
    general = job.job.model_copy(update={"name": name, "seed": seed})
    backbone = job.backbone.model_copy(update={"source": f"path:{folder}", "weights": "pretrained"})
    return job.model_copy(update={"job": general, "backbone": backbone})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert(tmp_path / "backbone")
    return tmp_path / "backbone"


def words_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.base_model.model.bert.embeddings.word_embeddings.weight
    return found


def test_weights_that_were_replaced_are_loaded(folder: Path) -> None:
    before = open_workbench(job_of(folder))
    assert open_workbench(job_of(folder)) is before
    bert(folder, seed=1)
    after = open_workbench(job_of(folder))
    assert after.backbone.fingerprint != before.backbone.fingerprint
    assert not torch.equal(words_of(after.model), words_of(before.model))
    assert open_stack(job_of(folder)).bench is after


def test_a_tokenizer_that_was_replaced_is_read(folder: Path) -> None:
    backbone, _ = open_processor(job_of(folder))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("[UNK]", "[unk]"))
    again, _ = open_processor(job_of(folder))
    assert again.fingerprint != backbone.fingerprint


def test_texts_are_read_with_the_tokenizer_that_is_there(tmp_path: Path) -> None:
    """Also where the weights are random, whose fingerprint is of the config alone."""
    job = make_job("bert")
    source = Path(job.backbone.source.removeprefix("path:"))
    shutil.copytree(source, tmp_path / "backbone")
    backbone = job.backbone.model_copy(update={"source": f"path:{tmp_path / 'backbone'}"})
    job = job.model_copy(update={"backbone": backbone})
    (tmp_path / "train.jsonl").write_text('{"text": "word", "label": "1"}\n' * 9)
    (tmp_path / "site.toml").write_text('name = "a"\n[data]\ntrain = "train.jsonl"\n')
    node = {"site": str(tmp_path / "site.toml"), "state": str(tmp_path / "s"), "device": "cpu"}

    def first() -> int:
        batch = open_participant(node).splits(job).train.batch(np.array([0]))
        return int(batch["input_ids"][0, 0])

    assert first() == 1  # unknown
    file = tmp_path / "backbone" / "tokenizer.json"
    file.write_text(file.read_text().replace('"[UNK]": 1', '"[UNK]": 1, "word": 2'))
    assert first() == 2


def test_a_file_that_appears_counts(folder: Path) -> None:
    backbone, _ = open_processor(job_of(folder))
    (folder / "added_tokens.json").write_text("{}")
    assert open_processor(job_of(folder))[0].fingerprint != backbone.fingerprint


def test_a_folder_that_is_gone_is_no_backbone(folder: Path) -> None:
    open_workbench(job_of(folder))
    shutil.rmtree(folder)
    with pytest.raises(BackboneError):
        open_workbench(job_of(folder))


def frozen(module: nn.Module) -> set[int]:
    """Where the frozen tensors lie in memory."""
    return {p.untyped_storage().data_ptr() for p in module.parameters() if not p.requires_grad}


def test_jobs_share_the_backbones_tensors(folder: Path) -> None:
    """Whatever their names, seeds and methods are."""
    jobs = [
        job_of(folder),
        job_of(folder, name="next"),
        job_of(folder, seed=3),
        job_of(folder, rank=1),
    ]
    benches = [open_workbench(job) for job in jobs]
    assert benches[0] is benches[1] is not benches[2]
    bodies = [frozen(bench.model.base_model.model.bert) for bench in benches]
    assert bodies[0] == bodies[2] == bodies[3]
    assert not np.array_equal(benches[0].initial, benches[2].initial)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stacks_share_them_too(folder: Path, precision: str) -> None:
    seen = []
    for seed in range(3):
        job = job_of(folder, seed=seed)
        training = job.training.model_copy(update={"precision": precision})
        stack = open_stack(job.model_copy(update={"training": training}))
        body = stack.model.get_submodule("bert")
        seen.append({n: p.untyped_storage().data_ptr() for n, p in body.named_parameters()})
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("first", [True, False])
def test_what_trains_is_not_shared(folder: Path, first: bool) -> None:
    """Biases train in the place where they are; of a whole block peft trains a copy."""
    plain = job_of(folder)
    if not first:
        open_workbench(plain)
    partly = open_workbench(job_of(folder, kind="partial", blocks=1, biases=True, head="shared"))
    whole = open_workbench(plain)
    trained = {p.data_ptr() for p in partly.model.parameters() if p.requires_grad}
    assert trained and trained.isdisjoint(p.data_ptr() for p in whole.model.parameters())
    before = {name: p.clone() for name, p in whole.model.named_parameters()}
    partly.put((partly.layout, partly.initial + np.float32(1)))
    assert all(torch.equal(p, before[name]) for name, p in whole.model.named_parameters())


def test_another_backbone_takes_its_place(folder: Path, tmp_path: Path) -> None:
    bench = open_workbench(job_of(folder))
    open_stack(job_of(folder))
    alive = weakref.ref(words_of(bench.model))
    del bench
    gc.collect()
    assert alive() is not None
    bert(tmp_path / "other", seed=2)
    open_processor(job_of(tmp_path / "other"))
    gc.collect()
    assert alive() is None
    close_backbone()


def test_a_stack_is_of_the_workbench_that_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody copies another backbone to the place while the first is loaded."""
    real = model._made

    def replaced(job: Job, held: Resident) -> Any:
        made = real(job, held)
        bert(folder, seed=1)
        return made

    with monkeypatch.context() as during:
        during.setattr(model, "_made", replaced)
        with pytest.raises(BackboneError, match="changed while they were read"):
            open_stack(job_of(folder))
    stack, bench = open_stack(job_of(folder)), open_workbench(job_of(folder))
    assert stack.bench is bench
    assert torch.equal(stack.model.get_parameter(WORDS), words_of(bench.model))


def test_a_tokenizer_is_of_the_backbone_that_it_is_known_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load.read_config

    def replaced(backbone: Any) -> Any:
        bert(folder, seed=1)
        return real(backbone)

    with monkeypatch.context() as during:
        during.setattr(model, "read_config", replaced)
        with pytest.raises(BackboneError, match="changed while they were read"):
            open_processor(job_of(folder))
    open_processor(job_of(folder))


def test_drawn_heads_that_stay_frozen_are_not_shared(folder: Path) -> None:
    """Two seeds draw two heads, and neither is in the folder."""
    heads = []
    for seed in (0, 1):
        bench = open_workbench(job_of(folder, seed=seed, head="frozen"))
        heads.append(bench.model.base_model.model.classifier.weight)
    assert not torch.equal(*heads)


def test_what_was_made_goes_with_its_workbench(folder: Path) -> None:
    for rank in range(1, KEPT + 3):
        open_stack(job_of(folder, rank=rank))
    held = resident(job_of(folder).backbone.source, "pretrained")
    assert held.made.keys() == held.benches.keys() and len(held.made) == KEPT
