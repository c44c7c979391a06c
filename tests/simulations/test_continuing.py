"""A job that goes on from an earlier one, and one that is held to what that one knew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.evaluations import measured_labels
from support.federations import adapter_of, digits_job, run_digits
from support.language_models import job_settings, save_language_model
from support.trainings import book, digits, make_job, noisy, settings, task

from fedgraft.client.model.batched_model import open_stack
from fedgraft.client.participant import open_participant
from fedgraft.client.training.ewc import Consolidation
from fedgraft.client.training.trainer import Trained, train
from fedgraft.common.adapters.fisher import ANCHOR, NEW, OLD
from fedgraft.common.adapters.initial import starting_point
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.console import Console
from fedgraft.common.errors import InputError, JobError
from fedgraft.common.layout import EWC, Vector
from fedgraft.server.export.adapter import export_adapter
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.demo import digits as demo
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

MEASURED = "training.consolidation={}"


def exported(run: Any, folder: Path) -> Path:
    bench = open_workbench(run.job)
    plan = make_plan(run.job, bench, run.session)
    export_adapter(run, bench, plan.exchanged, adapter_of(run), folder)
    bench.put()
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vector]:
    """The export of a run that measured, and its adapter."""
    folder = tmp_path_factory.mktemp("earlier")
    run, _ = run_digits(folder / "runs", MEASURED, "rounds.count=2")
    return exported(run, folder / "out"), adapter_of(run)


def start_of(job: Job) -> tuple[Any, Vector]:
    bench = open_workbench(job)
    exchanged = make_plan(job, bench, "").exchanged
    return exchanged, starting_point(job, bench, exchanged)


# Where a job starts


def test_a_job_starts_from_the_earlier_adapter(earlier: tuple[Path, Vector]) -> None:
    folder, adapter = earlier
    exchanged, start = start_of(digits_job(f"start.adapter={folder}"))
    np.testing.assert_array_equal(start, adapter[: exchanged.size])
    plain, initial = start_of(digits_job())
    assert plain == exchanged and not np.array_equal(start, initial)


def test_the_head_may_start_anew(earlier: tuple[Path, Vector]) -> None:
    folder, adapter = earlier
    exchanged, start = start_of(digits_job(f"start.adapter={folder}", "start.head=false"))
    _, initial = start_of(digits_job())
    for name, where in exchanged.slices.items():
        wanted = initial if "modules_to_save" in name else adapter
        np.testing.assert_array_equal(start[where], wanted[where])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("method.head=frozen",), "has a trained head, and method.head is frozen"),
        (("job.labels=['1', '0', '2', '3', '4', '5', '6', '7', '8', '9']",), "in another order"),
        (("job.labels=['0', '1', '2', '3', '4', '5', '6', '7', '8', 'x']",), "is for other labels"),
    ],
    ids=["frozen", "reordered", "renamed"],
)
def test_a_head_that_would_be_lost_or_mistaken_is_refused(
    overrides: tuple[str, ...], why: str, earlier: tuple[Path, Vector]
) -> None:
    start = f"start.adapter={earlier[0]}"
    with pytest.raises(InputError, match=why) as caught:
        start_of(digits_job(start, *overrides))
    assert "start.head = false" in caught.value.hint
    exchanged, begins = start_of(digits_job(start, "start.head=false", *overrides))
    paths = exchanged.only(name for name in exchanged.names if ".lora_" in name)
    assert paths.size
    every, learnt = start_of(digits_job(start))
    np.testing.assert_array_equal(exchanged.part(begins, paths), every.part(learnt, paths))


@pytest.mark.parametrize(
    "method",
    [{}, {"kind": "partial", "blocks": 1}, {"dora": True}],
    ids=["lora", "partial", "dora"],
)
def test_local_heads_cannot_begin_with_an_earlier_one(method: dict[str, Any]) -> None:
    change = [f"method.{key}={value}".replace("True", "true") for key, value in method.items()]
    local = ("start.adapter=/somewhere", "method.head=local", *change)
    with pytest.raises(JobError, match="it would be lost") as caught:
        digits_job(*local)
    assert "start.head = false" in caught.value.hint
    assert digits_job(*local, "start.head=false").start is not None
    if not method:
        digits_job("start.adapter=/somewhere")  # shared heads go on


@pytest.mark.slow
def test_a_run_goes_on_from_there(earlier: tuple[Path, Vector], tmp_path: Path) -> None:
    folder, adapter = earlier
    one_step = (
        "rounds.count=1",
        "training.learning_rate=1e-7",
        "simulation.central.learning_rate=1e-7",
        "simulation.baselines=['local_only', 'central']",
    )
    run, summary = run_digits(tmp_path, f"start.adapter={folder}", *one_step)
    assert np.abs(adapter_of(run) - adapter[: len(adapter_of(run))]).max() < 1e-5
    assert str(folder.parent) not in summary["job_toml"] and "out" in summary["job_toml"]
    for site in summary["sites"]:  # what it is held against begins there too
        accuracies = {site[name]["accuracy"] for name in ("federated", "local_only", "central")}
        assert len(accuracies) == 1
    told = run.job.for_sites().start
    assert told is not None and told.adapter == "of an earlier run"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("start.adapter=/nowhere",), "no folder /nowhere"),
        (("training.consolidation.weight=3",), "there is none"),
    ],
)
def test_what_cannot_start_is_refused_before_anything_is_written(
    overrides: tuple[str, ...], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        prepare(digits_job(*overrides))


def test_an_adapter_of_another_rank_is_refused(earlier: tuple[Path, Vector]) -> None:
    with pytest.raises(InputError):
        prepare(digits_job(f"start.adapter={earlier[0]}", "method.rank=2"))


def test_labels_go_on_from_texts_without_any(tmp_path: Path) -> None:
    """What filling gaps in texts taught the low-rank path is where a classification starts."""
    backbone = save_language_model("bert", tmp_path / "backbone")
    lines = [json.dumps({"text": f"to be {n} or not", "label": "ab"[n % 2]}) for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    raw = job_settings("bert", backbone, str(tmp_path / "rows.jsonl"))
    raw["simulation"] |= {"sites": 2, "partition": {"kind": "iid"}, "baselines": [], "workers": 0}
    with Run.create(tmp_path / "runs", parse_job(raw, where="test")) as run:
        simulate(prepare(run.job), run, Console(quiet=True))
    learnt = adapter_of(run)
    raw["job"] |= {"task": "text-classification", "labels": ["a", "b"]}
    raw["method"]["head"] = "shared"
    raw["start"] = {"adapter": str(exported(run, tmp_path / "out"))}
    with pytest.raises(InputError, match="has no head") as caught:
        start_of(parse_job(raw, where="test"))
    assert "start.head = false" in caught.value.hint
    raw["start"]["head"] = False
    exchanged, start = start_of(parse_job(raw, where="test"))
    paths = exchanged.only(name for name in exchanged.names if ".lora_" in name)
    assert learnt.any() and np.array_equal(exchanged.part(start, paths), learnt)
    assert exchanged.size > paths.size  # a new head besides


@pytest.mark.slow
def test_an_export_that_did_not_measure_cannot_hold(tmp_path: Path) -> None:
    run, _ = run_digits(tmp_path / "runs", "rounds.count=1")
    out = exported(run, tmp_path / "out")
    assert not (out / "fisher.safetensors").exists()
    prepare(digits_job(f"start.adapter={out}", MEASURED))
    with pytest.raises(InputError, match="no Fisher information"):
        prepare(digits_job(f"start.adapter={out}", "training.consolidation.weight=1"))


@pytest.mark.parametrize("rule", ["ffa", "median"])
def test_rules_that_do_not_fit_are_refused(rule: str) -> None:
    with pytest.raises(JobError, match=f'"{rule}"|plain mean'):
        digits_job(MEASURED, f"aggregation.rule={rule}")


# What is measured


def small(weight: float = 0.0) -> Any:
    return open_stack(make_job("vit", training={"consolidation": {"weight": weight}}))


def test_the_export_has_the_mean_over_sites(earlier: tuple[Path, Vector]) -> None:
    folder, adapter = earlier
    arrays = load_file(folder / "fisher.safetensors")
    job = digits_job(MEASURED)
    exchanged = make_plan(job, open_workbench(job), "").exchanged
    told = adapter[exchanged.slices[NEW]] / np.float32(SCALE)
    flat = np.concatenate([arrays[name].reshape(-1) for name in exchanged.of_model.names])
    np.testing.assert_array_equal(flat, told)
    assert flat.min() >= 0 and flat.max() > 1e-6


# What is held


def test_the_pull_is_that_of_the_paper() -> None:
    """lambda/2 sum F (x - x*)^2: of the gradient with the pull, what is without it is left over."""
    stack = small(5.0)
    layout = stack.bench.layout
    flat = torch.from_numpy(noisy(stack.bench))[None].clone()
    pass_ = Consolidation(settings(consolidation={"weight": 5.0}).consolidation, layout, flat)  # type: ignore[arg-type]
    size = stack.bench.carried.size
    places = (slice(0, size), layout.slices[OLD], layout.slices[ANCHOR])
    x, old, anchor = (flat[0, place].clone() for place in places)
    gradient = torch.zeros_like(flat)
    pass_.pull(gradient, flat)
    torch.testing.assert_close(gradient[0, :size], 5.0 * old * (x - anchor))
    assert not gradient[0, size:].any()


def test_what_was_handed_out_comes_back_as_it_was() -> None:
    stack = small(5.0)
    layout, start = stack.bench.layout, noisy(stack.bench)
    wanted = settings(consolidation={"weight": 5.0}, weight_decay=0.5, epochs=2)
    (came,) = train(stack, layout, [task(digits(), start)], settings=wanted)
    assert isinstance(came, Trained)
    for name in (OLD, ANCHOR):
        where = layout.slices[name]
        np.testing.assert_array_equal(came.vector[where], start[where])


def test_measuring_alone_changes_no_training() -> None:
    stack = small()
    wanted = settings(epochs=2, weight_decay=0.1)
    bench = stack.bench
    expected, _ = book(bench, digits(), wanted, layout=bench.carried)
    start = bench.layout.merged(bench.initial, (bench.carried, noisy(bench, bench.carried)))
    measured = settings(epochs=2, weight_decay=0.1, consolidation={})
    (came,) = train(stack, bench.layout, [task(digits(), start)], settings=measured)
    assert isinstance(came, Trained)
    np.testing.assert_allclose(bench.layout.part(came.vector, bench.carried), expected, atol=3e-6)


@pytest.mark.slow
def test_what_the_old_data_needs_is_forgotten_less(tmp_path: Path) -> None:
    """First the digits 0 to 4, then 5 to 9, at the same sites: how well are 0 to 4 known after?"""
    first = ("simulation.train=" + str(some(tmp_path, range(5))), "rounds.count=3")
    second = ("simulation.train=" + str(some(tmp_path, range(5, 10))), "rounds.count=3")
    run, _ = run_digits(tmp_path / "runs", *first, MEASURED)
    out = exported(run, tmp_path / "out")
    known = {}
    for weight in (0.0, 1000.0):
        held = (f"start.adapter={out}", f"training.consolidation={{weight={weight}}}")
        after, _ = run_digits(tmp_path / "runs", *second, *held)
        known[weight] = right(after, digits_job(*first))
    before = right(run, digits_job(*first))
    assert before > known[1000.0] > known[0.0] + 0.03


def some(folder: Path, labels: Any) -> Path:
    """The real digits with these labels, as folders of images."""
    out = folder / f"digits-{labels[0]}"
    for number, row in enumerate(demo.load()[0].select(range(700))):
        if row["label"] in labels:
            path = out / str(row["label"]) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return out


def right(run: Any, of: Job) -> float:
    """How many of the first site's rows of the job ``of`` the run's last adapter has right."""
    site = open_participant(make_nodes(of, prepare(of), states="", device="cpu")[0])
    bench = open_workbench(of)
    carried = open_workbench(run.job).carried
    vector = bench.layout.merged(bench.initial, (carried, adapter_of(run)[: carried.size]))
    rows = site.splits(of).train
    found = measured_labels(site.stack(of), bench.layout, vector, rows, of.measures)
    return float(found.correct.mean())


def test_beside_an_adapter_three_vectors_travel() -> None:
    for weight, count in ((0.0, 1), (2.0, 3)):
        layout = small(weight).bench.layout
        assert sum(name.startswith(EWC) for name in layout.names) == count
        assert layout.size == (1 + count) * layout.of_model.size
