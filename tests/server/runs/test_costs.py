"""What `fedgraft check` promises of a job is what a real round then costs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import family_job
from support.language_models import job_settings, save_language_model
from support.matrix import slow_unless
from support.peaks import Peak
from support.trainings import MAX_LENGTH, rows_for
from support.trainings import make_job as small_job

from fedgraft.client.data.cache import Store
from fedgraft.client.data.rows import encode, read_split
from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.training.evaluate import measure
from fedgraft.client.training.trainer import TrainingTask, train_alone
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.examples import Examples, TextExamples
from fedgraft.server.plan import Plan, make_plan
from fedgraft.server.protocol.transport import Transport
from fedgraft.server.rounds import run_round
from fedgraft.server.runs.costs import OVERHEAD_MB, Costs, estimate_costs
from fedgraft.server.state import RoundRecord, State
from fedgraft.simulations.demo import digits
from fedgraft.simulations.grid.local_grid import LocalGrid
from fedgraft.simulations.grid.workers import Workers

SITES = ("amy", "bob")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("sites")
    rows, _ = digits.load()
    configs = []
    for index, name in enumerate(SITES):
        own = folder / name
        own.mkdir()
        rows.select(range(40 * index, 40 * index + 40)).to_parquet(own / "train.parquet")
        config = f'name = "{name}"\ndevice = "cpu"\n[data]\ntrain = "train.parquet"\n'
        (own / "site.toml").write_text(config)
        configs.append({"site": str(own / "site.toml")})
    return configs


def make_job(*, rule: str = "fedavg", validation: float = 0.2, **method: Any) -> Job:
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": list(digits.NAMES)},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "rank": 2, "targets": ["q_proj", "v_proj"], **method},
        "rounds": {"count": 1},
        "aggregation": {"rule": rule},
        "data": {"validation": validation, "normalize": "per-image"},
    }
    return parse_job(raw, where="test")


def measured(
    job: Job, nodes: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Costs, Plan, RoundRecord]:
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    bench = open_workbench(job)
    costs = estimate_costs(make_plan(job, bench, session=""), bench)
    plan = make_plan(job, bench, session="0" * 32)
    here = [{**node, "state": str(tmp_path / "state")} for node in nodes]
    with Workers(0, device="cpu") as workers:
        transport = Transport(LocalGrid(here, workers), clock=lambda: 0.0)
        assert all(reply.payload for reply in transport.invite(plan.request, 1.0))
        state = State(0, bench.initial_of(plan.exchanged))
        _, record = run_round(plan, transport, state)
    assert record.dropped == () and record.sites == len(SITES)
    return costs, plan, record


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "shared"},
        {"head": "local"},
        {"head": "shared", "rule": "ffa"},
        {"head": "shared", "validation": 0},
    ],
    ids=["shared", "local", "ffa", "unvalidated"],
)
def test_bytes_are_those_of_a_real_round(
    settings: dict[str, Any],
    nodes: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs, plan, record = measured(make_job(**settings), nodes, tmp_path, monkeypatch)
    assert costs.bytes_up == pytest.approx(record.bytes_up / len(SITES), rel=0.01)
    assert costs.bytes_down == pytest.approx(record.bytes_down / len(SITES), rel=0.01)
    assert costs.bytes_up > 4 * costs.exchanged_parameters == 4 * plan.exchanged.size


# Of glyph-vit: width 96, 3 layers, 10 labels; rank 2 at two 96 x 96 modules of each layer.
FACTOR, HEAD = 3 * 2 * 2 * 96, 96 * 10 + 10


@pytest.mark.parametrize(
    ("settings", "exchanged", "trained"),
    [
        ({"head": "shared"}, 2 * FACTOR + HEAD, 2 * FACTOR + HEAD),
        ({"head": "local"}, 2 * FACTOR, 2 * FACTOR + HEAD),
        ({"head": "frozen"}, 2 * FACTOR, 2 * FACTOR),
        ({"head": "shared", "rule": "ffa"}, FACTOR + HEAD, FACTOR + HEAD),
        ({"head": "local", "rule": "ffa"}, FACTOR, FACTOR + HEAD),
    ],
)
def test_parameters_are_counted(settings: dict[str, Any], exchanged: int, trained: int) -> None:
    job = make_job(**settings)
    bench = open_workbench(job)
    costs = estimate_costs(make_plan(job, bench, session=""), bench)
    assert (costs.exchanged_parameters, costs.trained_parameters) == (exchanged, trained)
    assert costs.total_parameters == 227_722
    assert costs.weights_mb == pytest.approx(227_722 * 4 / 2**20)


def test_activations_grow_with_the_micro_batch_and_not_with_accumulation() -> None:
    def activations(**training: int) -> float:
        raw = make_job(head="shared").model_dump(mode="json", exclude_none=True)
        job = parse_job({**raw, "training": training}, where="test")
        bench = open_workbench(job)
        return estimate_costs(make_plan(job, bench, session=""), bench).activations_mb

    one = activations(batch_size=16)
    assert one > 0
    assert activations(batch_size=32) == pytest.approx(2 * one)
    assert activations(batch_size=32, accumulation=2) == pytest.approx(one)


def test_estimating_leaves_the_adapter_as_it_was() -> None:
    job = make_job(head="shared")
    bench = open_workbench(job)
    bench.put()
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    costs = estimate_costs(make_plan(job, bench, session=""), bench)
    assert all(np.array_equal(p.detach(), before[n]) for n, p in bench.model.named_parameters())
    assert costs.memory_mb > costs.weights_mb + costs.activations_mb


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_backbone_that_could_also_write_is_given_what_the_task_reads(
    family: str, tmp_path: Path
) -> None:
    job = family_job(family, tmp_path)
    bench = open_workbench(job)
    costs = estimate_costs(make_plan(job, bench, session=""), bench)
    assert 0 < costs.activations_mb < 100


# What a site takes


def taken(job: Job, rows: Examples) -> int:
    """The most bytes of tensors while a site trains and evaluates."""
    stack = open_stack(job)
    start, generator = stack.bench.initial, torch.Generator().manual_seed(0)
    with Peak() as peak:
        train_alone(
            stack, stack.bench.layout, TrainingTask(rows, start, generator), settings=job.training
        )
        measure(stack, stack.bench.layout, start, rows, measures=job.measures)
    return int(peak.bytes)


def promised(job: Job) -> float:
    bench = open_workbench(job)
    costs = estimate_costs(make_plan(job, bench, session=""), bench)
    return costs.memory_mb - OVERHEAD_MB - costs.weights_mb


def full_texts(count: int) -> TextExamples:
    """Texts of as many tokens as a job allows."""
    every = np.arange(count)
    ids = np.full(count * MAX_LENGTH, 5, np.int32)
    lengths = np.full(count, MAX_LENGTH)
    return TextExamples(every % 10, ids, every * MAX_LENGTH, lengths, None, 0, False, MAX_LENGTH)


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_memory_is_within_a_factor_of_two(kind: str, batch: int) -> None:
    job = small_job(kind, training={"batch_size": batch})
    rows = rows_for(kind, 64) if kind == "vit" else full_texts(64)
    assert 0.5 < promised(job) * 2**20 / taken(job, rows) < 2


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "masked-lm")])
@pytest.mark.parametrize("batch", slow_unless([1, 16], lambda batch: batch == 1))
def test_memory_is_so_too_where_a_vocabulary_is_large(
    kind: str, task: str, batch: int, tmp_path: Path
) -> None:
    folder = save_language_model(kind, tmp_path / "backbone")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 5000}))
    lines = [json.dumps({"text": "a bc def " * 40}) for _ in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    raw = job_settings(kind, folder, str(tmp_path / "rows.jsonl"))
    raw["backbone"]["weights"] = "random"
    raw["training"] = {**raw.get("training", {}), "batch_size": batch}
    job = parse_job(raw, where="test")
    assert job.job.task == task
    rows = encode(
        read_split(str(tmp_path / "rows.jsonl"), job).dataset,
        open_workbench(job).processor,
        job,
        store=Store(tmp_path / "store", memory=10**8, disk=0),
        key="k",
    )
    assert len(rows) >= batch
    assert 0.5 < promised(job) * 2**20 / taken(job, rows) < 2
