"""How a simulation is cut into work changes its speed, and its last bits only by the job's word."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.federations import adapter_of, digits_job, run_digits, write_digits
from support.matrix import thinned

from fedgraft.client.participant import open_participant
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError
from fedgraft.common.layout import Vector
from fedgraft.simulations.data.partition import PreparedSites
from fedgraft.simulations.grid import engine
from fedgraft.simulations.grid.engine import MOST, Nodes, choose_sites_per_pass, make_nodes
from fedgraft.simulations.preparation import prepare

CACHE = {"memory": 64_000_000, "disk": 4_000_000_000}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_digits(tmp_path_factory.mktemp("digits"), 120, 30)


# Nodes


def nodes(*ranks: int) -> Nodes:
    return Nodes(tuple("abcde"), "/sites", "/states", (("device", "cpu"), ("x", "y")), ranks)


def test_a_node_is_made_of_its_sites_name() -> None:
    wanted = {"site": "/sites/b/site.toml", "state": "/states/b", "device": "cpu", "x": "y"}
    assert nodes()[1] == wanted
    assert nodes()[-4] == wanted
    assert list(nodes()) == [nodes()[number] for number in range(5)]
    assert nodes()[1:3] == [nodes()[1], nodes()[2]]
    assert nodes()[::-2] == [nodes()[4], nodes()[2], nodes()[0]]
    assert len(nodes()) == 5
    for number in (5, -6):
        with pytest.raises(IndexError):
            nodes()[number]


def test_ranks_go_round_in_turn() -> None:
    assert [node.get("rank") for node in nodes()] == [None] * 5
    assert [node["rank"] for node in nodes(4, 2)] == ["4", "2", "4", "2", "4"]
    assert nodes(4, 2)[-1]["rank"] == "4"
    assert nodes(4, 2)[1]["rank"] == nodes(4, 2)[1:2][0]["rank"] == "2"


def test_ten_thousand_nodes_are_little_to_send_to_a_worker() -> None:
    names = tuple(f"site-{number:05d}" for number in range(10_000))
    many = replace(nodes(), names=names, extra=(("cache", "x" * 1000),))
    assert len(pickle.dumps(many)) < 200_000
    assert pickle.loads(pickle.dumps(many))[9_999] == many[9_999]


def test_nodes_are_those_of_the_prepared_sites(data: tuple[str, ...], tmp_path: Path) -> None:
    options = ("simulation.ranks=[2, 1]", "simulation.workers=3", "simulation.cache.memory='40MB'")
    job = digits_job(*data, *options)
    prepared = prepare(job)
    made = make_nodes(job, prepared, states=str(tmp_path), device="cpu")
    assert [node["site"] for node in made] == [
        str(prepared.folder / site.name / "site.toml") for site in prepared.sites
    ]
    assert all(Path(node["site"]).is_file() for node in made)
    assert [node["state"] for node in made] == [str(tmp_path / s.name) for s in prepared.sites]
    assert [node["rank"] for node in made] == ["2", "1", "2"]
    # What one process may hold: the workers' and this one's are not more than the job says.
    assert [json.loads(node["cache"]) for node in made] == [{**CACHE, "memory": 10_000_000}] * 3
    assert all("federation" not in node for node in made)
    participant = open_participant(made[1])
    assert (participant.config.rank, participant.device) == (1, "cpu")
    assert participant.store.recent.budget == 5_000_000


def test_only_sites_of_a_masked_run_are_in_a_federation(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    masked = ("privacy.secure_aggregation.enabled=true", "simulation.sites=4")
    job = digits_job(*data, *masked)
    prepared = prepare(job)
    running = make_nodes(job, prepared, states=str(tmp_path), device="cpu")
    assert {node["federation"] for node in running} == {str(tmp_path / "federation.toml")}
    before = make_nodes(job, prepared, states="", device="cpu")
    assert all("federation" not in node for node in before)


# Sites in a pass


def chosen(job: Job, prepared: PreparedSites | None = None) -> int:
    made = make_nodes(job, prepared or prepare(job), states="", device="cpu")
    return choose_sites_per_pass(job, made)


@pytest.mark.parametrize(
    ("asked", "rounds", "wanted"),
    [
        ("1", "rounds.count=1", 1),
        ("2", "rounds.count=1", 2),
        ("6", "rounds.count=1", 6),
        ("7", "rounds.count=1", 6),
        ("200", "rounds.count=1", 6),
        ("5", "rounds.cohort=3", 3),
        ("5", "rounds.fraction=0.5", 3),
        ("5", "rounds.cohort=1", 1),
    ],
)
def test_the_job_may_say_how_many(
    data: tuple[str, ...], asked: str, rounds: str, wanted: int
) -> None:
    options = ("simulation.sites=6", f"simulation.sites_per_pass={asked}", rounds)
    assert chosen(digits_job(*data, *options)) == wanted


def auto(data: tuple[str, ...], *options: str) -> Job:
    return digits_job(*data, "simulation.sites=12", "training.batch_size=8", *options)


@pytest.mark.parametrize(
    ("enough", "cohort", "wanted"),
    [
        (1.0, 12, 1),
        (1e15, 12, 3),  # a quarter of the cohort: there are as many passes at least
        (1e15, 9, 3),
        (1e15, 8, 2),
        (1e15, 4, 1),
        (1e15, 1, 1),
    ],
)
def test_a_cohort_is_cut_into_passes_of_enough_work(
    data: tuple[str, ...],
    enough: float,
    cohort: int,
    wanted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "ENOUGH", {"fp32": enough, "bf16": 0.0})
    assert chosen(auto(data, f"rounds.cohort={cohort}")) == wanted


def test_the_work_of_a_pass_is_counted_not_timed(
    data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one site's batch; as many sites as come to enough, to the nearest power of two."""
    monkeypatch.setattr(engine, "SHARES", 1)
    monkeypatch.setattr(engine, "MOST", 12)
    flops = 8 * 17 * 2 * 3 * (4 * 96 * 96 + 2 * 96 * 192)  # the large layers of eight images
    for times, wanted in ((0.9, 1), (1.2, 1), (1.7, 2), (2.5, 2), (3.2, 4), (5.0, 4), (6.5, 8)):
        monkeypatch.setattr(engine, "ENOUGH", {"fp32": times * flops * 1.1})
        assert chosen(auto(data)) == wanted
    monkeypatch.setattr(engine, "ENOUGH", {"fp32": 1e15})
    assert chosen(auto(data)) == 12
    assert chosen(auto(data, "training.batch_size=8", "training.accumulation=8")) == 12
    monkeypatch.setattr(engine, "ENOUGH", {"fp32": 5.0 * flops * 1.1})
    assert chosen(auto(data, "training.accumulation=2")) == 8  # a micro-batch is half the work
    assert MOST >= 32


def test_what_is_kept_from_before_is_no_work(
    data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRA in the last of three layers alone, two thirds of the work are not done again."""
    monkeypatch.setattr(engine, "SHARES", 1)
    monkeypatch.setattr(engine, "ENOUGH", {"fp32": 8 * 17 * 2 * 3 * (4 * 96 * 96 + 2 * 96 * 192)})
    assert chosen(auto(data)) == 1
    assert chosen(auto(data, "method.targets=['layers.2.mlp.fc1']")) in (2, 4)


def test_the_choice_is_the_same_whatever_was_computed_before(data: tuple[str, ...]) -> None:
    job = auto(data)
    prepared = prepare(job)
    first = chosen(job, prepared)
    made = make_nodes(job, prepared, states="", device="cpu")
    stack = open_participant(made[0]).stack(job)
    layout = stack.bench.layout
    for sites in (3, 5):
        flat = np.stack([stack.bench.initial] * sites)
        stack.put(layout, torch.from_numpy(flat))
        assert chosen(job, prepared) == first
    more = job.model_copy(
        update={"simulation": prepared.settings.model_copy(update={"workers": 3})}
    )
    assert chosen(more, prepared) == first


def test_a_job_without_a_simulation_has_one_site_in_a_pass(data: tuple[str, ...]) -> None:
    job = auto(data)
    made = make_nodes(job, prepare(job), states="", device="cpu")
    assert choose_sites_per_pass(job.for_sites(), made) == 1


def test_a_backbone_that_would_mix_sites_has_them_one_by_one(
    data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise InputError("rows would mix", hint="simulation.sites_per_pass = 1")

    monkeypatch.setattr(engine, "check_stacking", refuse)
    with pytest.raises(InputError, match="rows would mix"):
        chosen(auto(data, "simulation.sites_per_pass=3"))
    assert chosen(auto(data, "simulation.sites_per_pass=1")) == 1
    monkeypatch.setattr(engine, "ENOUGH", {"fp32": 1e15})
    assert chosen(auto(data)) == 1  # nobody asked for more


# Whole runs


WHOLE = (
    "simulation.sites=5",
    "simulation.baselines=['local_only', 'head_only']",
    "simulation.finetune_epochs=1",
    "training.batch_size=8",
    "training.dropout=0.1",
    "method.dropout=0.1",
    "rounds.count=2",
    "rounds.cohort=4",
)


def run(folder: Path, data: tuple[str, ...], workers: int, together: int) -> tuple[Vector, object]:
    options = (f"simulation.workers={workers}", f"simulation.sites_per_pass={together}")
    done, summary = run_digits(folder, *data, *WHOLE, *options)
    return adapter_of(done), [summary[key] for key in ("final", "sites", "site_map", "moved")]


@pytest.mark.parametrize(("together", "workers"), thinned([(3, 2), (3, 3), (1, 2), (1, 3)], 4))
def test_the_number_of_workers_changes_no_byte(
    data: tuple[str, ...], tmp_path: Path, together: int, workers: int
) -> None:
    (one, told), (other, same) = (run(tmp_path / str(k), data, k, together) for k in (0, workers))
    assert one.tobytes() == other.tobytes()
    assert told == same


@pytest.mark.slow
def test_the_number_of_sites_in_a_pass_changes_the_last_bits_only(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    (one, _), (other, _) = (run(tmp_path / str(k), data, 0, k) for k in (1, 3))
    assert np.abs(one - other).max() < 1e-4
    assert np.abs(one - other).mean() < 1e-6
