"""What a run came to is kept at its sites, whole and by nobody else's name, and can be used."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from support.evaluations import measured_labels
from support.guarded import Guarded
from support.masked_federations import SESSION, Consortium, make_job

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.participant import open_participant
from fedgraft.client.results import store as results
from fedgraft.client.results.store import find_result, keep_result, list_results
from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.adapters.peft_folder import read_adapter
from fedgraft.common.errors import InputError
from fedgraft.common.layout import Vector
from fedgraft.common.messages.payloads import (
    PastRound,
    PlanReply,
    Refusal,
    ResultReply,
    ResultRequest,
)
from fedgraft.common.metrics.measures import LabelMeasures

RUN = "20261126-t-1a2b"
OPEN = {"secure_aggregation": "allowed", "min_cohort": 1}
PAST = (PastRound(1, 3, 2.0, 0.25), PastRound(2, 3, 1.5, float("nan")))


@pytest.fixture
def clear(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, make_job(masked=False, validation=0.25, count=4))


def bench_of(consortium: Consortium) -> Workbench:
    return open_workbench(consortium.job)


def final(consortium: Consortium, seed: int = 1) -> Vector:
    start = bench_of(consortium).initial_of(consortium.plan.exchanged)
    noise = np.random.default_rng(seed).normal(0, 0.05, start.shape)
    return (start + noise).astype(np.float32)


def result_of(consortium: Consortium, **changes: Any) -> ResultRequest:
    plan = consortium.plan
    request = ResultRequest(
        session=SESSION,
        round=2,
        run=RUN,
        job=plan.request.job,
        names=plan.exchanged.names,
        sites=3,
        rounds=PAST,
        adapter=final(consortium),
    )
    return replace(request, **changes)


def agreed(consortium: Consortium, **changes: Any) -> Guarded:
    node = Guarded(consortium, privacy=OPEN, **changes)
    assert isinstance(node.ask(consortium.plan.request, "plan"), PlanReply)
    return node


def test_the_adapter_is_kept_recorded_and_found_again(clear: Consortium) -> None:
    node = agreed(clear)
    assert node.ask(result_of(clear), "result") == ResultReply(SESSION)
    came, went = node.lines[-2:]
    assert (came["stage"], came["direction"], came["round"]) == ("query.result", "in", 2)
    assert [one["name"] for one in came["tensors"]] == ["adapter"]
    assert (went["decision"], went["tensors"]) == ("sent", [])
    assert went["bytes"] < 200  # that it is kept, and nothing else
    (kept,) = list_results(node.place)
    assert kept == find_result(node.place, RUN)
    assert (kept.session, kept.sites, kept.job) == (SESSION, 3, clear.job.for_sites())
    assert kept.backbone == "builtin:glyph-vit"
    assert [line.accuracy for line in kept.rounds[:1]] == [0.25]
    assert np.isnan(kept.rounds[1].accuracy)
    bench, exchanged = bench_of(clear), clear.plan.exchanged
    vector = bench.layout.part(read_adapter(bench, kept.folder / "adapter"), exchanged)
    assert np.array_equal(vector, final(clear))


def test_peft_loads_it_and_is_as_good_as_the_federation_says(clear: Consortium) -> None:
    node = agreed(clear)
    node.ask(result_of(clear), "result")
    folder = node.place / "results" / RUN / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    at = open_participant(node.config)
    examples, bench = at.splits(clear.job).train, bench_of(clear)
    vector = bench.layout.merged(bench.initial, (clear.plan.exchanged, final(clear)))
    ours = measured_labels(at.stack(clear.job), bench.layout, vector, examples, LabelMeasures(10))
    auto = transformers.AutoModelForImageClassification
    base = auto.from_pretrained(bench.backbone.folder, num_labels=10, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.inference_mode():
        theirs = (
            model(**as_tensors(examples.batch(np.arange(len(examples))))).logits.argmax(-1).numpy()
        )
    assert np.array_equal(theirs, ours.predicted)


def test_a_second_time_changes_nothing(clear: Consortium) -> None:
    node = agreed(clear)
    node.ask(result_of(clear), "result")
    before = (node.place / "results" / RUN / "result.json").read_bytes()
    assert node.ask(result_of(clear), "result") == ResultReply(SESSION)
    assert (node.place / "results" / RUN / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run": "../../escape"}, "bad-run"),
        ({"run": ""}, "bad-run"),
        ({"run": ".hidden"}, "bad-run"),
        ({"run": "x" * 129}, "bad-run"),
        ({"adapter": np.zeros(3, np.float32)}, "bad-adapter"),
        ({"adapter": np.zeros((1, 1), np.float64)}, "bad-adapter"),
        ({"names": ("base.other",)}, "not-agreed"),
        ({"session": "f" * 32}, "not-agreed"),
        ({"session": "../../etc"}, "bad-session"),
        ({"round": 99}, "policy-rounds"),
    ],
)
def test_what_is_not_a_result_of_what_was_agreed_is_refused(
    clear: Consortium, changes: dict[str, Any], code: str
) -> None:
    node = agreed(clear)
    assert node.ask(result_of(clear, **changes), "result").code == code
    assert not list((node.place / "results").rglob("*"))
    assert node.said[-1] == ("query.result", "refused", code)


def test_an_adapter_that_is_not_finite_is_refused(clear: Consortium) -> None:
    bad = final(clear)
    bad[7] = np.nan
    reply = agreed(clear).ask(result_of(clear, adapter=bad), "result")
    assert reply == Refusal(SESSION, "bad-adapter")


def test_another_run_cannot_take_the_place_of_one(clear: Consortium) -> None:
    node = agreed(clear)
    node.ask(result_of(clear), "result")
    other = "f" * 32
    assert isinstance(node.ask(replace(clear.plan.request, session=other), "plan"), PlanReply)
    request = result_of(clear, session=other, adapter=final(clear, seed=9))
    assert node.ask(request, "result").code == "run-name-taken"
    assert find_result(node.place, RUN).session == SESSION


def test_a_result_may_come_outside_of_the_hours_of_work(
    clear: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = agreed(clear)
    monkeypatch.setattr(
        "fedgraft.client.policy.policy_file.Hours.include", lambda self, moment: False
    )
    node.rule(limits={"hours": "20:00-06:00"})
    assert node.ask(clear.training(), "train").code == "policy-hours"
    assert node.ask(result_of(clear), "result") == ResultReply(SESSION)


def test_where_heads_stay_at_sites_the_folder_has_this_sites_own(tmp_path: Path) -> None:
    job = make_job(masked=False, validation=0.25, count=4, method={"head": "local"})
    private = Consortium(tmp_path, job)
    node = agreed(private)
    node.ask(private.training(), "train")
    node.ask(result_of(private, round=1), "result")
    bench, folder = bench_of(private), node.place / "results" / RUN / "adapter"
    (kept,) = (node.place / SESSION).glob("*.safetensors")
    head = bench.layout.part(read_adapter(bench, folder), bench.local)
    assert np.array_equal(head, results_head(kept))
    assert not np.array_equal(head, bench.initial_of(bench.local))
    assert "this site's own" in (folder / "README.md").read_text()


def results_head(path: Path) -> Vector:
    from safetensors.numpy import load_file

    return np.asarray(load_file(path)["head"])


def test_a_disk_that_is_full_leaves_no_half_a_result(
    clear: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = agreed(clear)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_text", full)
    assert node.ask(result_of(clear), "result").code == "OSError"
    assert list_results(node.place) == []
    monkeypatch.undo()
    assert node.ask(result_of(clear), "result") == ResultReply(SESSION)  # as it is sent again


def test_a_damaged_file_is_named(clear: Consortium) -> None:
    at = open_participant(agreed(clear).config)
    keep_result(at, result_of(clear))
    (at.state / "results" / RUN / "result.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        find_result(at.state, RUN)
    for name in ("nobody", "../x", ""):
        with pytest.raises(InputError, match="no result"):
            find_result(at.state, name)
